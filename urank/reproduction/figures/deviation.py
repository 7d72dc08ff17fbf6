"""How far the measured rows of a table are from the paper's, as a figure and a table."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from urank.reproduction.figures.groups import family_of
from urank.reproduction.figures.style import COLORS, STYLE, closed

PANELS = ("MLU %", "params", "MACs", "change")
COMPARED = ("original %", *PANELS)  # accuracies of the originals form one cluster per data set: not drawn
MARKERS = "osD^vP"


def deviation(table: pd.DataFrame) -> Figure:
    """Draw measured over printed numbers: one panel per column of a `measured_table`, one point per network.

    On the diagonal both agree. Colour is the data set, shape the family, the number the depth.
    """
    pairs = beside_paper(table)
    networks = pairs.index.get_level_values("network")
    colors = dict(zip(pairs.index.get_level_values("dataset").unique(), COLORS))
    markers = dict(zip(dict.fromkeys(map(family_of, networks)), MARKERS))
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
    """Return the rows that are both printed and measured, with columns (one of `COMPARED`, "paper" or "measured")."""
    is_printed = table.index.get_level_values("source") == "paper"
    printed, measured = (table[chosen].droplevel("source") for chosen in (is_printed, ~is_printed))
    shared = printed.index.intersection(measured.index, sort=False)
    both = {"paper": printed.loc[shared, list(COMPARED)], "measured": measured.loc[shared, list(COMPARED)]}
    return pd.concat(both, axis=1).swaplevel(axis=1)


def finish(axis: Axes, column: str, pairs: pd.DataFrame) -> None:
    """Label the axes and give both the same limits, so that agreement is the diagonal."""
    low, high = (pairs.min().min(), pairs.max().max()) if len(pairs) else (0, 1)
    room = 0.08 * (high - low)
    limits = (low - room, high + room)
    axis.set(title=column, xlabel="paper", ylabel="measured", xlim=limits, ylim=limits, aspect="equal")


def legend(colors: dict[str, str], markers: dict[str, str]) -> list[Line2D]:
    """Return the legend of colours, shapes and the diagonal."""
    datasets = [Line2D([], [], ls="", marker="o", color=color, label=name) for name, color in colors.items()]
    families = [Line2D([], [], ls="", marker=shape, color="0.4", label=name) for name, shape in markers.items()]
    return [*datasets, *families, Line2D([], [], color="0.6", label="as printed")]


def deviation_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the largest distance from the paper for each column, and the network that is furthest off."""
    pairs = beside_paper(table)
    distances = {name: (pairs[name, "measured"] - pairs[name, "paper"]).abs().dropna() for name in COMPARED}
    rows = {
        name: dict(rows=len(of), mean=of.mean(), largest=of.max(), network=" on ".join(reversed(of.idxmax())))
        for name, of in distances.items()
        if len(of)  # a change needs a fine-tuned network
    }
    return pd.DataFrame(
        rows.values(), index=pd.Index(rows, name="column"), columns=["rows", "mean", "largest", "network"]
    )


def depth(network: str) -> str:
    """Return the number in a network's name: "11" of "vgg11"."""
    return network.removeprefix(family_of(network))
