"""The style that all figures and tables share: colours, fonts, number formats, captions."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from urank.reproduction.record import Record

# Distinct in print, on both page themes and for readers who do not tell red from green (Okabe & Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000", "#F0E442")
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "legend.frameon": False,
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
    | dict.fromkeys(["k_S", "||W - W'|| / ||W|| %", "paper's MLU %"], "{:.0f}")
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
    if "tolerance" in frame.index.names:
        table = table.format_index("{:g}", level="tolerance")
    return table.set_table_styles(TABLE + (TEXT if text else [])).set_uuid(identifier)


def caption(drawn: str, records: Sequence[Record], see: str = "") -> str:
    """Return a caption in Markdown: what is drawn, from which records, and the one thing to see.

    >>> from urank.reproduction.profiles import recorded
    >>> caption("Rank per layer.", recorded("cifar10/vgg11"), "The rank peaks in the middle.")
    '*Rank per layer.* Record: `cifar10/vgg11`. The rank peaks in the middle.'
    """
    names = ", ".join(f"`{record.experiment.name}`" for record in records)
    return f"*{drawn}* Record{'s' * (len(records) > 1)}: {names}. {see}".rstrip()


def millions(count: float) -> str:
    """Return a count in millions (M) or, from 1e9 on, in thousands of millions (G)."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e6:.{3 if count < 1e5 else 2 if count < 1e7 else 1}f} M"
