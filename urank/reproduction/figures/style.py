"""The style that all figures and tables share: colours, fonts, number formats, captions.

A network has the same colour in every figure, the paper's numbers are grey, and W is dotted where W' is solid.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from urank.reproduction.paths import RECORDS
from urank.reproduction.record import Record

REPOSITORY = "https://github.com/urank/urank"

# Distinct in print, on both page themes and for readers who do not tell red from green (Okabe & Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000", "#F0E442")
# One hue per family, darker with depth; also told apart by lightness, in grey and by colour-blind readers.
NETWORK_COLORS = {
    **{"vgg11": "#3D9BE0", "vgg13": "#0072B2", "vgg16": "#004F7C", "vgg19": "#002A42"},
    **{"resnet18": "#E58A00", "resnet34": "#D26A00", "resnet50": "#B84700", "resnet101": "#6E2600"},
    **{"vit": "#009E73", "deit": "#5C7F00", "swin": "#AA4499"},
}
GREY = "#767676"  # the paper's numbers
WIDTH = 6.0  # of a figure, in inches; a page scales it to the width of its text
NAMES = {"vgg": "VGG", "resnet": "ResNet", "vit": "ViT", "swin": "Swin", "deit": "DeiT"}
NAMES |= {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet-1k": "ImageNet-1k"}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 11,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "figure.labelsize": 11,
    "legend.frameon": False,
    "figure.figsize": (WIDTH, 3.2),
    "figure.constrained_layout.use": True,
}
# A wide table breaks the lines of its heads, and then scrolls by itself, so that a page stays as wide as a phone.
TABLE = [
    {"selector": "", "props": "display: block; overflow-x: auto; width: fit-content; max-width: 100%"},
    {"selector": "th, td", "props": "padding: 0.15em 0.5em; white-space: nowrap; vertical-align: top"},
    {"selector": "th.row_heading", "props": "white-space: normal"},
    {"selector": "th.col_heading", "props": "white-space: normal; vertical-align: bottom"},
]
# Of a column of words among numbers; "important", as the rule for all cells of the table is the more specific one.
WRAPPED = {"white-space": "normal !important", "min-width": "9em"}
TEXT = [{"selector": "th, td", "props": "text-align: left; white-space: normal; min-width: 6em"}]


def signed(change: float) -> str:
    """Return a difference of accuracies in points with the precision that 10,000 images allow.

    >>> signed(-1.05), signed(0.3)
    ('-1.05', '+0.3')
    """
    return f"{change:+.2f}".removesuffix("0")


PERCENTS = ("original %", "full rank %", "MLU of W %", "MLU %", "projected %", "split %", "fine-tuned %")
CHANGES = (
    "change",
    "full rank, change",
    "fine-tuned − full rank",
    "original − paper",
    "MLU − largest",
    "paper's change",
)
# Number formats by column.
FORMATS = (
    dict.fromkeys([*PERCENTS, "MACs of original, M", "MACs, M", "moved by at most"], "{:.1f}")
    | dict.fromkeys(CHANGES, signed)
    | dict.fromkeys(["params", "MACs", "FLOPs", "speed", "lost, consulted", "lost, test"], "{:.2f}")
    | dict.fromkeys(["params of original, M", "params, M"], "{:.2f}")
    | dict.fromkeys(["learning rate", "may lose", "energy %"], "{:g}")
    | dict.fromkeys(["layers", "smaller as two", "k_S", "||W - W'|| / ||W|| %", "paper's MLU %"], "{:.0f}")
    | dict.fromkeys(["mean", "largest"], "{:.2g}")
    | {"utilization": "{:.3f}", "paper's MLU − largest": "{:+.0f}"}
    | dict.fromkeys(["accuracy kept %", "kept at 80 %"], "{:.1f}")
)
# For tables whose rows differ by less than a tenth of a point.
EXACT = dict.fromkeys(PERCENTS, "{:.2f}") | dict.fromkeys(CHANGES, "{:+.2f}")


def closed(figure: Figure) -> Figure:
    """Close the figure in pyplot, so that a notebook shows it only where it is displayed."""
    plt.close(figure)
    return figure


def notebook_style() -> None:
    """Show a notebook's figures as SVG in the book's style; a figure drawn again has the same SVG text."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats  # Jupyter installs it

    set_matplotlib_formats("svg", metadata={"Date": None})
    plt.rcParams.update(STYLE | {"svg.hashsalt": "urank"})


def small_multiples(count: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as the text and its `count` panels in rows of `columns`, each `height` inches high."""
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False, **shared)
    for unused in grid.flat[count:]:
        unused.remove()
    panels = list(grid.flat[:count])
    for panel in panels[-columns:]:
        panel.tick_params(labelbottom=True)  # also above an unused place
    return figure, panels


def network_color(network: str) -> str:
    """Return the colour of a network, the same in every figure; black for one of another family.

    >>> network_color("vgg19"), network_color("torchvision/vit_b_16") == network_color("vit")
    ('#002A42', True)
    """
    return next((color for name, color in NETWORK_COLORS.items() if name in network), "#000000")


def spelled(name: str) -> str:
    """Return the name of a network or a data set as papers write it.

    >>> spelled("vgg11"), spelled("cifar100")
    ('VGG11', 'CIFAR-100')
    """
    family = name.rstrip("0123456789")
    return NAMES.get(name) or NAMES.get(family, family) + name.removeprefix(family)


def heading(record: Record) -> str:
    """Return what a panel shows, for example "VGG11 on CIFAR-10"."""
    return f"{spelled(record.experiment.network)} on {spelled(record.experiment.dataset)}"


def styled(frame: pd.DataFrame, identifier: str, formats: dict | None = None, text: bool = False) -> Styler:
    """Return the table as a page shows it: a missing number is a dash, and the HTML is reproducible.

    Args:
        identifier: unique on its page.
        formats: by column, in addition to `FORMATS`.
        text: the cells contain text: left-aligned, with line breaks.
    """
    patterns = FORMATS | (formats or {})
    table = frame.style.format({name: patterns[name] for name in frame if name in patterns}, na_rep="–")
    if "paper" in frame.index:  # printed with fewer decimals
        printed = {name: FORMATS[name] for name in frame if name in FORMATS}
        table = table.format(printed, na_rep="–", subset=pd.IndexSlice[["paper"], :])
    table = table.format_index(lambda name: name.replace("$\\epsilon$", "ε") if isinstance(name, str) else name)
    if "tolerance" in frame.index.names:
        table = table.format_index("{:g}", level="tolerance")
    return table.set_table_styles(TABLE + (TEXT if text else [])).set_uuid(identifier)


def caption(drawn: str, records: Sequence[Record], see: str = "") -> str:
    """Return a caption in Markdown: what is drawn, from which records, and the one thing to see.

    >>> from urank.reproduction.profiles import recorded
    >>> caption("Rank per layer.", recorded("cifar10/vgg11"), "The rank peaks in the middle.").split("(")[0]
    '*Rank per layer.* Record: [`cifar10/vgg11`]'
    """
    names = ", ".join(map(linked, records))
    return f"*{drawn}* Record{'s' * (len(records) > 1)}: {names}. {see}".rstrip()


def linked(record: Record) -> str:
    """Return a record's name in Markdown, with a link to its file if it is committed.

    >>> from urank.reproduction.profiles import recorded
    >>> linked(*recorded("cifar10/vgg11"))
    '[`cifar10/vgg11`](https://github.com/urank/urank/blob/main/data/records/cifar10/vgg11.json)'
    """
    name = record.experiment.name
    file = RECORDS / f"{name}.json"
    is_committed = file.exists() and Record.load(file) == record
    return f"[`{name}`]({REPOSITORY}/blob/main/data/records/{name}.json)" if is_committed else f"`{name}`"


def millions(count: float) -> str:
    """Return a count in millions (M) or, from 1e9 on, in thousands of millions (G)."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e6:.{3 if count < 1e5 else 2 if count < 1e7 else 1}f} M"
