"""How far the measured rows of a table are from the paper's, as a picture."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from urank.reproduction.figures.selection import family_of
from urank.reproduction.figures.style import COLORS, STYLE, closed

PANELS = ("MLU %", "params", "MACs", "change")
COMPARED = ("original %", *PANELS)  # the originals' accuracies are two heaps, one a data set: told, not drawn
MARKERS = "osD^vP"


def deviation(table: pd.DataFrame) -> Figure:
    """Measured over printed numbers, a panel a column of `table` (see `tables.comparison`), a point a network.

    On the diagonal both agree. The colour of a point says its data set, the shape its family, the number its depth.
    """
    pairs = beside_paper(table)
    networks = pairs.index.get_level_values("network")
    colors = dict(zip(pairs.index.get_level_values("dataset").unique(), COLORS))
    markers = dict(zip(dict.fromkeys(family_of(name) for name in networks), MARKERS))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(6.2, 6.6), layout="constrained")
        for axis, column in zip(axes.flat, PANELS):
            axis.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
            for (dataset, network), (printed, ours) in pairs[column].iterrows():
                look = dict(color=colors[dataset], marker=markers[family_of(network)], ms=5, alpha=0.8)
                axis.plot(printed, ours, ls="", **look)
                side = dict(xytext=(4, -7)) if ours < printed else dict(xytext=(-4, 2), ha="right")  # off the diagonal
                axis.annotate(depth(network), (printed, ours), textcoords="offset points", fontsize=7, **side)
            finish(axis, column, pairs[column])
        figure.legend(handles=legend(colors, markers), loc="outside lower left", ncols=len(colors) + len(markers) + 1)
    return closed(figure)


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are both the paper's and measured; columns (one of `COMPARED`, "paper" or "measured")."""
    is_printed = table.index.get_level_values("source") == "paper"
    printed, measured = (table[chosen].droplevel("source") for chosen in (is_printed, ~is_printed))
    shared = printed.index.intersection(measured.index, sort=False)
    both = {"paper": printed.loc[shared, list(COMPARED)], "measured": measured.loc[shared, list(COMPARED)]}
    return pd.concat(both, axis=1).swaplevel(axis=1)


def finish(axis: Axes, column: str, pairs: pd.DataFrame) -> None:
    """The same limits on both axes, so that the diagonal is one."""
    low, high = (pairs.min().min(), pairs.max().max()) if len(pairs) else (0, 1)
    room = 0.08 * (high - low)
    limits = (low - room, high + room)
    axis.set(title=column, xlabel="paper", ylabel="measured", xlim=limits, ylim=limits, aspect="equal")


def legend(colors: dict[str, str], markers: dict[str, str]) -> list[Line2D]:
    """What colours, shapes and the line mean."""
    datasets = [Line2D([], [], ls="", marker="o", color=color, label=name) for name, color in colors.items()]
    families = [Line2D([], [], ls="", marker=shape, color="0.4", label=name) for name, shape in markers.items()]
    return [*datasets, *families, Line2D([], [], color="0.6", label="as printed")]


def deviation_caption(table: pd.DataFrame) -> str:
    """The mean and the largest distance from the paper, column by column, in one paragraph of Markdown."""
    pairs = beside_paper(table)
    if pairs.empty:
        return "None of these rows is one of the paper's."
    distances = {column: (pairs[column, "measured"] - pairs[column, "paper"]).abs().dropna() for column in COMPARED}
    parts = [
        f"{column.removesuffix(' %')} {distance.mean():.2g}{unit(column)} (at most {distance.max():.2g}: "
        f"{' on '.join(reversed(distance.idxmax()))})"
        for column, distance in distances.items()
        if len(distance)  # a change needs a fine-tuned network
    ]
    return f"Mean distance from the paper's {len(pairs)} rows: {'; '.join(parts)}."


def unit(column: str) -> str:
    return "" if column in ("params", "MACs") else " points"


def depth(network: str) -> str:
    """What a network's name has behind its family's: "11" of "vgg11"."""
    return network.removeprefix(family_of(network))
