"""The two pictures of the book's first page, both of the networks in Table 3.

Colour is the family of a network, grey is the paper. A filled circle is CIFAR-10 in the first picture and the compact
network in the second; a hollow one is CIFAR-100, and the full-rank network.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from urank.reproduction import paper, profiles
from urank.reproduction.figures.groups import family_of, place, without_variants
from urank.reproduction.figures.style import COLORS, GREY, STYLE, closed
from urank.reproduction.record import Record

FAMILY_COLORS = dict(vgg=COLORS[0], resnet=COLORS[1])
SIZE = 4.6  # inches: two pictures side by side fill the page, and one fills a phone
LOOK = STYLE | {"font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11}
# Where a name stands beside its point: offset in points, alignment. Below the diagonal right of it, otherwise left.
BELOW, ABOVE = (8, -4, "left"), (-8, -3, "right")
# Names that would overlap a neighbour there.
ELSEWHERE = {
    ("cifar10", "vgg16"): (-3, 7, "right"),
    ("cifar10", "resnet101"): ABOVE,
    ("cifar10", "resnet18"): (8, 1, "left"),
    ("cifar100", "resnet50"): (8, -9, "left"),
    ("cifar100", "vgg19"): (8, -9, "left"),
    ("cifar100", "vgg11"): (-8, -7, "right"),
    ("cifar100", "vgg13"): (4, 7, "right"),
    ("cifar100", "resnet18"): (0, -16, "center"),
}


def table3_networks() -> pd.DataFrame:
    """Return one row per network of Table 3, from the committed records; of several seeds the mean.

    Returns:
        `model`, `network`, `dataset`; MLU in percent, measured (`mlu`) and printed (`paper_mlu`); changes of accuracy
        in points relative to the original network: `compact` and `full_rank` after the same fine-tuning (nan where the
        full-rank network was not fine-tuned), and the paper's `paper_compact`.
    """
    records = without_variants(profiles.recorded())
    rows = pd.DataFrame(map(measured_row, records), index=pd.MultiIndex.from_tuples(map(place, records)))
    measured = rows.groupby(level=[0, 1]).mean()
    printed = paper.table3().rename(columns={"mlu": "paper_mlu", "delta": "paper_compact"})
    ours = measured.loc[list(zip(printed["dataset"], printed["network"]))].reset_index(drop=True)
    return printed[["model", "network", "dataset", "paper_mlu", "paper_compact"]].join(ours)


def measured_row(record: Record) -> dict[str, float]:
    accuracy = record.accuracy
    full_rank = float("nan") if accuracy.baseline is None else accuracy.baseline - accuracy.original
    return dict(mlu=100 * record.plan.mlu, compact=accuracy.finetuned - accuracy.original, full_rank=full_rank)


def mlu_as_printed(table: pd.DataFrame) -> Figure:
    """Draw the measured MLU over the printed one; on the grey diagonal both agree."""
    with plt.rc_context(LOOK):
        figure, axis = plt.subplots(figsize=(SIZE, SIZE), layout="constrained")
        axis.axline((0, 0), slope=1, color=GREY, lw=1.2, zorder=0)
        axis.annotate("as printed", (31, 31), xytext=(6, -10), textcoords="offset points", color=GREY)
        for row in table.itertuples():
            color = FAMILY_COLORS[family_of(row.network)]
            face = color if row.dataset == "cifar10" else "white"
            axis.plot(row.paper_mlu, row.mlu, "o", ms=7, mec=color, mew=1.6, mfc=face)
            place_name(axis, row, color)
        axis.set(xlabel="MLU in the paper (%)", ylabel="MLU measured (%)", aspect="equal", xlim=(20, 98), ylim=(20, 98))
        note = "filled: CIFAR-10\nhollow: CIFAR-100"
        axis.text(0.97, 0.04, note, transform=axis.transAxes, ha="right", color="#333333")
        figure.suptitle("Mean layer utilization is reproduced", x=0.02, ha="left", fontsize=12)
    return closed(figure)


def place_name(axis: Axes, row: Any, color: str) -> None:
    """Write a network's name beside its point."""
    x, y, side = ELSEWHERE.get((row.dataset, row.network), BELOW if row.mlu < row.paper_mlu else ABOVE)
    where = dict(xytext=(x, y), textcoords="offset points", ha=side)
    axis.annotate(row.model, (row.paper_mlu, row.mlu), **where, fontsize=9, color=color)


def compact_and_full_rank(table: pd.DataFrame) -> Figure:
    """Draw each compact network beside its full-rank network, both after the same fine-tuning, as a dumbbell."""
    rows = table.dropna(subset="full_rank").reset_index(drop=True)
    with plt.rc_context(LOOK):
        figure, axis = plt.subplots(figsize=(SIZE, SIZE), layout="constrained")
        axis.axvline(0, color="#333333", lw=1, zorder=0)
        for row in rows.itertuples():
            color = FAMILY_COLORS[family_of(row.network)]
            axis.plot([row.compact, row.full_rank], [row.Index] * 2, color=color, lw=2, alpha=0.5, zorder=2)
            axis.plot(row.compact, row.Index, "o", ms=7, color=color)
            axis.plot(row.full_rank, row.Index, "o", ms=7, mec=color, mew=1.6, mfc="white")
            axis.plot(row.paper_compact, row.Index, "D", ms=4.5, color=GREY, zorder=1)
        name_ends(axis, rows.iloc[-1], len(rows) - 1)
        names = [f"{row.model}, {row.dataset.upper().replace('CIFAR', 'CIFAR-')}" for row in rows.itertuples()]
        axis.set_yticks(range(len(rows)), names, fontsize=10)
        axis.set(xlabel="change of accuracy (points)", xlim=(-3.4, 2.6), ylim=(len(rows) - 0.1, -0.6))
        figure.suptitle("Every compact network ends below full rank", x=0.02, ha="left", fontsize=12)
    return closed(figure)


def name_ends(axis: Axes, row: pd.Series, height: int) -> None:
    """Name the three marks below the row in which they are furthest apart."""
    color = FAMILY_COLORS[family_of(row["network"])]
    ends = dict(compact=("compact", color), full_rank=("full rank", color), paper_compact=("paper", GREY))
    for end, (text, shade) in ends.items():
        where = dict(xytext=(0, -8), textcoords="offset points", ha="center", va="top")
        axis.annotate(text, (row[end], height), **where, fontsize=10, color=shade)


PICTURES: dict[str, Callable[[pd.DataFrame], Figure]] = dict(mlu=mlu_as_printed, full_rank=compact_and_full_rank)


def save(path: Path | str) -> None:
    """Write the picture that `path` names, mlu.svg or full_rank.svg; its metadata contain the numbers it shows."""
    path, table = Path(path), table3_networks()
    numbers = json.dumps(table.round(4).to_dict("records"))
    with plt.rc_context({"svg.hashsalt": "urank"}):  # the same file from the same numbers
        PICTURES[path.stem](table).savefig(path, metadata={"Date": None, "Description": numbers})
