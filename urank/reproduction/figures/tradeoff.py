"""Figure 3: accuracy against parameters, before and after."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from urank.reproduction.figures.selection import label
from urank.reproduction.figures.style import COLORS, STYLE, closed, millions, signed
from urank.reproduction.record import Record

LARGEST = 900  # area of the largest bubble, in square points
GREY = "#777777"
MOST_TICKS = 9  # that a logarithmic axis has room for


def tradeoff(points: pd.DataFrame, printed: pd.DataFrame | None = None, title: str = "") -> Figure:
    """One panel of Figure 3: accuracy against parameters, bubbles with the area of the MACs, arrows from the original
    network (pale) to the compact one (filled).

    Args:
        points: as `measured_points` or `paper.tradeoff` gives, with a column `label`.
        printed: the paper's points beside them, drawn hollow and grey.

    Raises:
        ValueError: no point.
    """
    everything = pd.concat([points, printed]) if printed is not None else points
    if len(everything) == 0:
        raise ValueError("a trade-off needs at least one network before and after")
    largest = everything["original_macs"].max()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
        if printed is not None:
            for row in printed.to_dict("records"):
                draw_pair(axis, row, largest, GREY, hollow=True)
            axis.plot([], [], "o", mfc="none", mec=GREY, label="the paper's (grey)")
        for index, row in enumerate(points.to_dict("records")):
            draw_pair(axis, row, largest, COLORS[index % len(COLORS)])
        axis.plot([], [], "o", color="none", label=f"bubble area: MACs; the largest {millions(largest)}")
        axis.set(title=title, xlabel="parameters (millions, logarithmic)", ylabel="accuracy (%)", xscale="log")
        axis.margins(0.17, 0.2)
        plain_ticks(axis)
        figure.legend(loc="outside lower left", ncols=2)
    return closed(figure)


def draw_pair(axis: Axes, row: dict, largest: float, color: str, hollow: bool = False) -> None:
    """Two bubbles and the arrow between them."""
    ends = [
        (row[f"{end}_params"] / 1e6, row[f"{end}_top1"], LARGEST * row[f"{end}_macs"] / largest)
        for end in ("original", "compact")
    ]
    for (x, y, area), face in zip(ends, ("none", "none") if hollow else (color + "40", color + "B0")):
        axis.scatter(x, y, s=area, facecolor=face, edgecolor=color, lw=1, zorder=2 if hollow else 3)
    arrow = dict(arrowstyle="->", color=color, lw=1.2, shrinkA=0, shrinkB=0)
    axis.annotate("", ends[1][:2], ends[0][:2], arrowprops=arrow, zorder=4)
    if not hollow:
        axis.plot([], [], "o", color=color, label=row["label"])


def plain_ticks(axis: Axes) -> None:
    """Numbers, not powers of ten, at places a reader can count with."""
    low, high = axis.get_xlim()
    inside = [counted(digits, low, high) for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))]
    ticks = next((ticks for ticks in inside if len(ticks) <= MOST_TICKS), inside[-1])
    if len(ticks) < 3:  # so short a piece of the axis is all but linear
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:.5g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(low, high)


def counted(digits: Sequence[int], low: float, high: float) -> list[float]:
    """The numbers between `low` and `high` that are one of `digits` times a power of ten."""
    numbers = [digit * 10.0**power for power in range(-4, 4) for digit in digits]
    return [number for number in numbers if low <= number <= high]


def measured_points(records: Sequence[Record]) -> pd.DataFrame:
    """Before and after of each record, as `tradeoff` draws them."""
    rows = []
    for record in records:
        experiment, cost, accuracy = record["experiment"], record["cost"], record["accuracy"]
        row = dict(label=label(record, records), network=experiment["network"], dataset=experiment["dataset"])
        for end, top1 in (("original", accuracy["original"]), ("compact", accuracy["merged"])):
            row |= {f"{end}_params": cost[end]["params"], f"{end}_macs": cost[end]["macs"], f"{end}_top1": top1}
        rows.append(row)
    return pd.DataFrame(rows)


def by_dataset(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The points of each data set, labelled by their network alone, with a row index from 0."""
    groups = points.assign(label=points["network"]).groupby("dataset")
    return {dataset: group.reset_index(drop=True) for dataset, group in groups}


def beside(points: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame | None:
    """The paper's points of the networks and data sets in `points`; None where it has none of them."""
    ours = set(zip(points["network"], points["dataset"]))
    found = printed[[pair in ours for pair in zip(printed["network"], printed["dataset"])]]
    return found if len(found) else None


def tradeoff_caption(points: pd.DataFrame, printed: pd.DataFrame | None = None) -> str:
    """What the panel says, in one paragraph of Markdown.

    Args:
        points: with a row index from 0.
        printed: the paper's points beside them.
    """
    theirs = "" if printed is None else f" The paper prints {span(gains(printed))} for the same."
    return f"{sizes(points)} Accuracy moves by {moves(points)}.{theirs}"


def sizes(points: pd.DataFrame) -> str:
    """Which network keeps the smallest and which the largest share of its parameters."""
    kept = points["compact_params"] / points["original_params"]
    saved = points["compact_macs"] / points["original_macs"]
    if len(points) == 1:
        return f"**{points.loc[0, 'label']}** keeps x {kept[0]:.2f} of its parameters and x {saved[0]:.2f} of its MACs."
    smallest, largest = kept.idxmin(), kept.idxmax()
    return (
        f"**{points.loc[smallest, 'label']}** keeps the smallest share of its parameters (x {kept[smallest]:.2f}, MACs "
        f"x {saved[smallest]:.2f}), **{points.loc[largest, 'label']}** the largest (x {kept[largest]:.2f}, MACs "
        f"x {saved[largest]:.2f})."
    )


def moves(points: pd.DataFrame) -> str:
    """From where to where the accuracies move, in words, and which moves best; one number where all move alike."""
    change, words = gains(points), span(gains(points))
    if len(points) == 1:
        return words
    return f"{words}, best for {points.loc[change.idxmax(), 'label']}" if " to " in words else f"{words} for each"


def span(change: pd.Series) -> str:
    """The smallest and the largest of some changes in points; one number where they are alike."""
    low, high = signed(change.min()), signed(change.max())
    return f"{low} points" if low == high else f"{low} to {high} points"


def gains(points: pd.DataFrame) -> pd.Series:
    """Accuracy points by which each network moves."""
    return points["compact_top1"] - points["original_top1"]
