"""Figures of Tables 1, 4 and 5: what the weights, the tolerance, or the part of a network change."""

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from urank.plan import LayerRank, RankPlan
from urank.reproduction.figures.groups import origin_label, variant
from urank.reproduction.figures.snapshot import draw_ranks
from urank.reproduction.figures.style import GREY, STYLE, closed, heading, network_color, small_multiples
from urank.reproduction.figures.tables import PRINTED, measured_table, with_labels
from urank.reproduction.record import Record

# The matrices of a transformer by their names in timm, without the number of the block. The queries, keys and values of
# `vit_pe` are three uses of two matrices.
PARTS = {
    "patch_embed.proj": "patches",
    **dict.fromkeys(("blocks.attn.qkv", "blocks.attn.qkv.q", "blocks.attn.qkv.k", "blocks.attn.qkv.v"), "QKV"),
    "blocks.attn.proj": "attention out",
    "blocks.mlp.fc1": "MLP in",
    "blocks.mlp.fc2": "MLP out",
    "head": "head",
}


def over_choice(number: int, records: Sequence[Record], columns: Mapping[str, str]) -> Figure:
    """Draw Table 4 (over the weights) or Table 5 (over the tolerance): stacked panels, the paper's ViT-B/16 in grey.

    Args:
        number: of the table.
        records: of one network.
        columns: the columns to draw, each with its axis label.
    """
    ours = measured_table(number, records).droplevel(["dataset", "network", "source"])
    read, (*_, choice) = PRINTED[number]
    printed = with_labels(read().set_index(choice)).sort_values("MLU %")
    printed = printed.rename(index=origin_label) if number == 4 else printed
    color = network_color(records[0].experiment.network)
    lines = ((heading(records[0]), ours.sort_values("MLU %"), color), ("paper: ViT-B/16 on ImageNet", printed, GREY))
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(columns), 1, 2.0, sharex=True)
        for axis, (column, label) in zip(panels, columns.items()):
            for name, rows, shade in lines:
                drawn = rows[column].dropna()
                axis.plot(drawn.index, drawn, "o-", color=shade, label=name)
            axis.set_ylabel(label)
        if number == 5:
            panels[-1].set(xscale="log", xlabel="tolerance of the search (points)")
            ticks = sorted({*ours.index, *printed.index})
            panels[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            panels[-1].set_xticks([], minor=True)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, labelcolor="linecolor")
    return closed(figure)


def utilization_by_part(records: Sequence[Record]) -> pd.DataFrame:
    """Return the utilization in percent of each matrix of timm transformers: columns record, weights, part, value."""
    rows = [
        (record.experiment.name, origin_label(variant(record)), PARTS[part_of(entry.layer)], 100 * entry.utilization)
        for record in records
        for entry in record.plan.layers
        if part_of(entry.layer) in PARTS
    ]
    return pd.DataFrame(rows, columns=["record", "weights", "part", "utilization %"])


def part_of(layer: str) -> str:
    """Return a layer's name without the number of its block.

    >>> part_of("blocks.3.mlp.fc1")
    'blocks.mlp.fc1'
    """
    return re.sub(r"\.\d+", "", layer)


def parts(records: Sequence[Record]) -> Figure:
    """Draw the utilization of each kind of matrix: one panel per network, a point per block, a bar for the mean."""
    frame = utilization_by_part(records)
    names = [name for name in dict.fromkeys(PARTS.values()) if name in set(frame["part"])]
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(records), len(records), 2.9, sharex=True, sharey=True)
        for axis, record in zip(panels, records):
            rows, color = frame[frame["record"] == record.experiment.name], network_color(record.experiment.network)
            for place, name in enumerate(names):
                values = rows.loc[rows["part"] == name, "utilization %"]
                axis.plot(values, [place] * len(values), "o", color=color, alpha=0.45, ms=5, mew=0)
                axis.plot(values.mean(), place, "|", color=color, ms=16, mew=2.5)
            axis.set_title(rows["weights"].iloc[0], loc="left")
            axis.set(xlim=(-4, 104), xticks=(0, 50, 100), yticks=range(len(names)), yticklabels=names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        figure.supxlabel("utilization (% of min(d, m)); bar: mean over the blocks", fontsize=10)
    return closed(figure)


def ranks_by_part(plan: RankPlan) -> Figure:
    """Draw the rank of W (dotted) and of W' (solid) over the blocks of a timm transformer, by kind of matrix."""
    blocks: dict[str, list[LayerRank]] = {name: [] for name in PARTS.values()}
    for entry in plan.layers:
        blocks[PARTS[part_of(entry.layer)]].append(entry)
    repeated = {name: entries for name, entries in blocks.items() if len(entries) > 1}
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(repeated), len(repeated), 2.6, sharex=True, sharey=True)
        for axis, (name, entries) in zip(panels, repeated.items()):
            draw_ranks(axis, entries, network_color("vit"))
            axis.set_title(name, loc="left", fontsize=10)
        panels[0].set_ylim(0, None)
        figure.supxlabel("block (dotted: rank of $W$; solid: rank of $W'$)")
        figure.supylabel("rank")
    return closed(figure)
