"""Figure 2: the rank of W and of W' in every layer, over the depth of a network."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from urank.reproduction.figures.groups import label, training_epochs, variant
from urank.reproduction.figures.style import COLORS, STYLE, closed, millions
from urank.reproduction.figures.tables import printed_row
from urank.reproduction.record import Record


def snapshot(records: Sequence[Record], title: str = "") -> Figure:
    """Draw one panel of Figure 2: rank of W (dotted) and of W' (solid), layer by layer.

    Brackets, as in the paper: parameters and accuracy of the original and of the compact network. The latter accuracy
    is after fine-tuning if every network was fine-tuned, otherwise before it.

    Raises:
        ValueError: no record.
    """
    if not records:
        raise ValueError("a snapshot needs at least one record")
    stage = "merged" if all(record.finetuned for record in records) else "decomposed"
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.9), layout="constrained")
        for color, record in zip(cycle(COLORS), records):
            layers = record.plan.layers
            places = np.arange(1, len(layers) + 1)
            axis.plot(places, [entry.weight_rank for entry in layers], ":", color=color, lw=1.5)
            name = f"{label(record, records)} {bracket(record, stage)}"
            axis.plot(places, [entry.rank for entry in layers], "o-", color=color, lw=1.6, ms=3.5, label=name)
        note = "" if stage == "merged" else "; accuracies before fine-tuning"
        axis.plot([], [], "k:", lw=1.5, label=f"dotted: rank of $W$; solid: rank of $W'${note}")
        axis.set(title=title, xlabel="layer", ylabel="rank", xlim=(0.5, None), ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower left")
    return closed(figure)


def bracket(record: Record, stage: str) -> str:
    """Return (parameters, accuracy) of the original, then of the compact network at this stage."""
    cost, accuracy = record.cost, record.accuracy
    ends = zip((cost.original, cost.compact), (accuracy.original, getattr(accuracy, stage)))
    return " → ".join(f"({millions(end.params)}, {top1:.1f} %)" for end, top1 in ends)


def peak_table(records: Sequence[Record]) -> pd.DataFrame:
    """Return where the utilized rank of each network is largest, and its MLU, beside the paper's MLU.

    Returns:
        Indexed by label: `peak` counts layers from 1; `rank` there, `of` min(d, m); `MLU − largest` in points, of the
        networks shown, and the same of the paper's for its networks.
    """
    frame = pd.DataFrame([peak_row(record) for record in records], index=[label(record, records) for record in records])
    for name in ("MLU", "paper's MLU"):
        below = frame[f"{name} %"] - frame[f"{name} %"].iloc[frame["MLU %"].argmax()]
        frame.insert(frame.columns.get_loc(f"{name} %") + 1, f"{name} − largest", below)
    known = frame["paper's MLU %"].notna().sum() > 1
    return frame if known else frame.drop(columns=["paper's MLU %", "paper's MLU − largest"])


def peak_row(record: Record) -> dict[str, object]:
    layers, numbers = record.plan.layers, peak_layers(record)
    sizes = dict.fromkeys(str(min(layers[number - 1].d, layers[number - 1].m)) for number in numbers)
    printed = None if variant(record) else printed_row(record)
    return {
        "layers": len(layers),
        "peak": ", ".join(map(str, numbers)),
        "rank": layers[numbers[0] - 1].rank,
        "of": ", ".join(sizes),
        "MLU %": 100 * record.plan.mlu,
        "paper's MLU %": float("nan") if printed is None else printed["mlu"],
        "epochs of training": training_epochs(record),
    }


def peak_layers(record: Record) -> list[int]:
    """Return the numbers, counted from 1, of the layers with the largest utilized rank."""
    ranks = [entry.rank for entry in record.plan.layers]
    return [number for number, rank in enumerate(ranks, 1) if rank == max(ranks)]
