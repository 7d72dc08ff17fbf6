"""Figure 3: accuracy against parameters, before and after."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from urank.reproduction.figures.groups import label
from urank.reproduction.figures.style import GREY, STYLE, WIDTH, closed, millions, network_color, spelled
from urank.reproduction.record import Record

LARGEST = 900  # area of the largest bubble, in square points
MOST_TICKS = 7  # on a logarithmic axis


def tradeoff(points: pd.DataFrame, printed: pd.DataFrame | None = None, title: str = "") -> Figure:
    """Draw one panel of Figure 3: accuracy against parameters, arrows from originals (hollow) to compact networks.

    The area of a bubble is proportional to the MACs.

    Args:
        points: as `measured_points` or `paper.tradeoff` gives, with a column `label`.
        printed: the paper's points beside them, drawn in grey.

    Raises:
        ValueError: no point.
    """
    everything = pd.concat([points, printed]) if printed is not None else points
    if len(everything) == 0:
        raise ValueError("a trade-off needs at least one network before and after")
    largest = everything["original_macs"].max()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 4))
        for row in printed.to_dict("records") if printed is not None else []:
            draw_pair(axis, row, largest, GREY)
        for row in points.to_dict("records"):
            draw_pair(axis, row, largest, network_color(row["network"]))
            name_pair(axis, row, largest)
        axis.set(title=title, xlabel="parameters (millions, logarithmic)", ylabel="accuracy (%)", xscale="log")
        note = f"area: MACs, largest {millions(largest)}" + ("" if printed is None else "\ngrey: the paper")
        axis.annotate(note, (0.01, 0.98), xycoords="axes fraction", va="top")
        axis.margins(0.12, 0.2)
        low, high = axis.get_xlim()
        axis.set_xlim(low * (low / high) ** 0.25, high)  # room for the names
        plain_ticks(axis)
    return closed(figure)


def name_pair(axis: Axes, row: dict, largest: float) -> None:
    """Write what an arrow shows to the left of its compact network."""
    place = (row["compact_params"] / 1e6, row["compact_top1"])
    radius = math.sqrt(LARGEST * row["compact_macs"] / largest / math.pi)  # in points
    style = dict(ha="right", va="center", color=network_color(row["network"]))
    style["path_effects"] = [withStroke(linewidth=2, foreground="white")]  # legible where an arrow passes behind it
    name = ", ".join(map(spelled, row["label"].split(", ")))
    axis.annotate(name, place, (-radius - 3, 0), textcoords="offset points", **style)


def draw_pair(axis: Axes, row: dict, largest: float, color: str) -> None:
    """Draw two bubbles and the arrow between them."""
    ends = [
        (row[f"{end}_params"] / 1e6, row[f"{end}_top1"], LARGEST * row[f"{end}_macs"] / largest)
        for end in ("original", "compact")
    ]
    for (x, y, area), face in zip(ends, ("none", color + "70")):
        axis.scatter(x, y, s=area, facecolor=face, edgecolor=color, lw=1)
    arrow = dict(arrowstyle="->", color=color, lw=1.2, shrinkA=0, shrinkB=0)
    axis.annotate("", ends[1][:2], ends[0][:2], arrowprops=arrow)


def plain_ticks(axis: Axes) -> None:
    """Label a logarithmic axis with plain numbers instead of powers of ten."""
    low, high = axis.get_xlim()
    inside = [counted(digits, low, high) for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))]
    ticks = next((ticks for ticks in inside if len(ticks) <= MOST_TICKS), inside[-1])
    if len(ticks) < 3:  # so short a piece of the axis is all but linear
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:.5g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(low, high)


def counted(digits: Sequence[int], low: float, high: float) -> list[float]:
    """Return the numbers between `low` and `high` that are one of `digits` times a power of ten."""
    numbers = [digit * 10.0**power for power in range(-4, 4) for digit in digits]
    return [number for number in numbers if low <= number <= high]


def measured_points(records: Sequence[Record]) -> pd.DataFrame:
    """Return each record before and after, as `tradeoff` draws them."""
    rows = []
    for record in records:
        experiment, cost, accuracy = record.experiment, record.cost, record.accuracy
        row = dict(label=label(record, records), network=experiment.network, dataset=experiment.dataset)
        ends = (("original", cost.original, accuracy.original), ("compact", cost.compact, accuracy.merged))
        for end, size, top1 in ends:
            row |= {f"{end}_params": size.params, f"{end}_macs": size.macs, f"{end}_top1": top1}
        rows.append(row)
    return pd.DataFrame(rows)


def by_dataset(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the points of each data set, labelled by network, with a row index from 0."""
    groups = points.assign(label=points["network"]).groupby("dataset")
    return {dataset: group.reset_index(drop=True) for dataset, group in groups}


def printed_for(points: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame | None:
    """Return the paper's points of the networks and data sets in `points`; None if it has none of them."""
    ours = set(zip(points["network"], points["dataset"]))
    found = printed[[pair in ours for pair in zip(printed["network"], printed["dataset"])]]
    return found if len(found) else None


def change_table(points: pd.DataFrame, printed: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return what the arrows show: the shares of parameters and MACs kept, and the change of accuracy in points.

    Args:
        printed: the paper's points, for a column with its change.
    """
    frame = pd.DataFrame(
        {
            "params": points["compact_params"] / points["original_params"],
            "MACs": points["compact_macs"] / points["original_macs"],
            "change": points["compact_top1"] - points["original_top1"],
        }
    ).set_axis(points["label"])
    if printed is not None:
        theirs = printed.set_index(["network", "dataset"])
        change = (theirs["compact_top1"] - theirs["original_top1"]).reindex(
            list(zip(points["network"], points["dataset"]))
        )
        frame["paper's change"] = change.to_numpy()
    return frame
