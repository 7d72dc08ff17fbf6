"""Figure of Table 3: measured over printed numbers."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from urank.reproduction.figures.groups import Groups, family_of, place, seed
from urank.reproduction.figures.style import GREY, STYLE, closed, network_color, small_multiples, spelled
from urank.reproduction.figures.tables import interval
from urank.reproduction.figures.variations import rows

UNITS = {"MLU %": "%", "params": "share of the original", "MACs": "share of the original", "change": "points"}


def deviation(table: pd.DataFrame, repeated: Groups = ()) -> Figure:
    """Draw measured over printed numbers: one panel per column of a `measured_table`, one point per network.

    On the diagonal both agree. Colour is the network, the number its depth; the first data set is filled.

    Args:
        repeated: records of several seeds, one group per network: a vertical line is the `interval` of each.
    """
    pairs = beside_paper(table)
    datasets = list(pairs.index.get_level_values("dataset").unique())
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(UNITS), 2, 3.1)
        for axis, column in zip(panels, UNITS):
            axis.axline((0, 0), slope=1, color=GREY, lw=1, zorder=0)
            for (dataset, network), (printed, ours) in pairs[column].iterrows():
                color = network_color(network)
                face = color if dataset == datasets[0] else "white"
                axis.plot(printed, ours, "o", ms=5.5, color=color, mfc=face, mew=1.4)
            for seeds in repeated:
                ends = interval(rows(seeds, [seed(record) for record in seeds])[column])
                printed, color = pairs.loc[place(seeds[0]), (column, "paper")], network_color(place(seeds[0])[1])
                axis.vlines(printed, *ends, color=color, lw=1.4, zorder=1)
            axis.set(xlim=span(pairs[column, "paper"]), ylim=span(pairs[column, "measured"]))
            axis.set(xlabel=f"paper ({UNITS[column]})", ylabel="measured")
            axis.set_title(column.removesuffix(" %"), loc="left")
            label_points(axis, pairs[column])
        name_marks(panels[0], datasets, [network for _, network in pairs.index])
    return closed(figure)


def name_marks(axis: Axes, datasets: Sequence[str], networks: Iterable[str]) -> None:
    """Say in the upper left of a panel which data set is filled, and which colour each family has."""
    marks = [f"{mark}: {spelled(name)}" for mark, name in zip(("filled", "hollow"), datasets)]
    families = {spelled(family_of(network)): network_color(network) for network in networks}
    words = [*((mark, "black") for mark in marks), *families.items()]
    for line, (word, color) in enumerate(words):
        axis.text(0.04, 0.96 - 0.085 * line, word, color=color, transform=axis.transAxes, va="top", fontsize=9)


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that are both printed and measured, with columns (one of `UNITS`, "paper" or "measured")."""
    is_printed = table.index.get_level_values("source") == "paper"
    printed, measured = (table[chosen].droplevel("source") for chosen in (is_printed, ~is_printed))
    shared = printed.index.intersection(measured.index, sort=False)
    both = {"paper": printed.loc[shared, list(UNITS)], "measured": measured.loc[shared, list(UNITS)]}
    return pd.concat(both, axis=1).swaplevel(axis=1)


def span(values: pd.Series) -> tuple[float, float]:
    """Return the limits of an axis with room around the values."""
    low, high = (values.min(), values.max()) if len(values) else (0, 1)
    room = 0.12 * (high - low or 1)
    return low - room, high + room


def label_points(axis: Axes, pairs: pd.DataFrame) -> None:
    """Write the depth of each network beside its point, on the side furthest from other points and labels."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    points = (pairs[["paper", "measured"]].to_numpy() - (left, bottom)) / (right - left, top - bottom)
    angles = np.arange(8) * np.pi / 4
    taken = list(points)
    for point, (_, network) in zip(tuple(taken), pairs.index):
        others = [other for other in taken if other is not point]
        spots = point + 0.075 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        spot = max(spots, key=lambda spot: min((np.hypot(*(spot - other)) for other in others), default=0))
        depth = network.removeprefix(family_of(network))
        style = dict(fontsize=8, ha="center", va="center", transform=axis.transAxes)
        axis.text(*spot, depth, color=network_color(network), **style)
        taken.append(spot)
