"""Figure 2: the rank of every layer's W and W' over the depth of a network."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from urank.reproduction.figures.selection import common, label, variant
from urank.reproduction.figures.style import COLORS, STYLE, closed, millions
from urank.reproduction.figures.tables import printed_row
from urank.reproduction.record import Record


def snapshot(records: Sequence[Record], title: str = "") -> Figure:
    """One panel of Figure 2: rank of W (dotted) and of W' (solid), layer by layer.

    Brackets, as in the paper: parameters and accuracy of the original network and of the compact one, after fine-tuning
    where every network was fine-tuned and else before it.

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
    """(parameters, accuracy) of the original, then of the compact network at this stage."""
    cost, accuracy = record["cost"], record["accuracy"]
    ends = zip((cost["original"], cost["compact"]), (accuracy["original"], accuracy[stage]))
    return " → ".join(f"({millions(end['params'])}, {top1:.1f} %)" for end, top1 in ends)


def snapshot_caption(records: Sequence[Record]) -> str:
    """What the panel says, in one paragraph of Markdown: where the rank peaks, and the MLU."""
    if len(records) == 1:
        return f"**{common(records)}.** The {peak(records[0])}."
    peaks = "; ".join(f"{label(record, records)}: the {peak(record)}" for record in records)
    return f"**{common(records)}.** {peaks}. {contrast(records)}"


def contrast(records: Sequence[Record]) -> str:
    """How far apart the MLUs are, the paper's where it has both, and whether the networks were trained as long."""
    most, least = (choose(records, key=lambda record: record.plan.mlu) for choose in (max, min))
    apart = f"{100 * (most.plan.mlu - least.plan.mlu):.1f} points"
    return (
        f"The MLU of **{label(most, records)}** is {'the largest, ' if len(records) > 2 else ''}{apart} above that of "
        f"**{label(least, records)}**{papers_contrast(most, least)}.{trained_otherwise(most, least)}"
    )


def papers_contrast(most: Record, least: Record) -> str:
    """The same difference as the paper prints it, in brackets; "" where it lacks one of the two."""
    printed = [printed_row(record) for record in (most, least) if not variant(record)]
    if len(printed) < 2 or any(row is None for row in printed):
        return ""
    return f" (the paper's: {printed[0]['mlu'] - printed[1]['mlu']:+.0f})"


def trained_otherwise(most: Record, least: Record) -> str:
    """A warning where two networks from scratch were trained for different numbers of epochs."""
    if variant(most) or variant(least):
        return ""
    lengths = [record["experiment"]["train"]["epochs"] for record in (most, least)]
    if lengths[0] == lengths[1]:
        return ""
    return f" The former was trained for {lengths[0]} epochs, the latter for {lengths[1]}."


def peak(record: Record) -> str:
    """Where the utilized rank is largest, and the MLU, in words."""
    layers, numbers = record.plan.layers, peak_layers(record)
    rank, mlu = layers[numbers[0] - 1].rank, f"MLU {100 * record.plan.mlu:.1f} %"
    if len(numbers) > 2:
        return f"utilized rank is largest in {len(numbers)} of {len(layers)} layers ({rank}), {mlu}"
    where = f"layer{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))} of {len(layers)}"
    rooms = " and ".join(str(min(layers[number - 1].d, layers[number - 1].m)) for number in numbers)
    return f"utilized rank is largest at {where} ({rank} of {rooms}), {mlu}"


def peak_layers(record: Record) -> list[int]:
    """The numbers, counted from 1, of the layers with the largest utilized rank."""
    ranks = [entry.rank for entry in record.plan.layers]
    return [number for number, rank in enumerate(ranks, 1) if rank == max(ranks)]
