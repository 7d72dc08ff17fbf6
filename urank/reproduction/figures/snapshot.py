"""Figure 2: the rank of W and of W' in every layer, over the depth of a network."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from urank.plan import LayerRank
from urank.reproduction.figures.groups import label, training_epochs, variant
from urank.reproduction.figures.style import STYLE, closed, heading, millions, network_color, small_multiples
from urank.reproduction.figures.tables import printed_row
from urank.reproduction.record import Record


def snapshot(records: Sequence[Record], title: str = "") -> Figure:
    """Draw one panel of Figure 2 as small multiples: rank of W (dotted) and of W' (solid), layer by layer.

    Above each network, as in the paper: parameters and accuracy of the original and of the compact network. The latter
    accuracy is after fine-tuning if every network was fine-tuned, otherwise before it.

    Raises:
        ValueError: no record.
    """
    if not records:
        raise ValueError("a snapshot needs at least one record")
    stage = "merged" if all(record.finetuned for record in records) else "decomposed"
    note = "" if stage == "merged" else "; accuracies before fine-tuning"
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(records), min(len(records), 2), 2.1, sharey=True)
        for axis, record in zip(panels, records):
            draw_ranks(axis, record.plan.layers, network_color(record.experiment.network))
            axis.set_title(f"{panel_title(record, records)}\n{bracket(record, stage)}", loc="left", fontsize=10)
        panels[0].set_ylim(0, None)
        figure.supxlabel(f"layer (dotted: rank of $W$; solid: rank of $W'${note})")
        figure.supylabel("rank")
        figure.suptitle(title)
    return closed(figure)


def draw_ranks(axis: Axes, layers: Sequence[LayerRank], color: str) -> None:
    """Draw the rank of W (dotted) and of W' (solid) of each layer."""
    places, projected = np.arange(1, len(layers) + 1), [entry.rank for entry in layers]
    axis.plot(places, [entry.weight_rank for entry in layers], ":", color=color, lw=1.4)
    axis.plot(places, projected, "o-", color=color, lw=1.6, ms=3 if len(layers) < 20 else 0)
    axis.fill_between(places, projected, color=color, alpha=0.15, lw=0)
    axis.xaxis.get_major_locator().set_params(nbins=5, integer=True)


def panel_title(record: Record, among: Sequence[Record]) -> str:
    """Return network and data set, and what else tells the record from those it is shown with."""
    named = (record.experiment.network, record.experiment.dataset)
    return ", ".join([heading(record), *(word for word in label(record, among).split(", ") if word not in named)])


def bracket(record: Record, stage: str) -> str:
    """Return parameters and accuracy of the original and of the compact network at this stage."""
    cost, accuracy = record.cost, record.accuracy
    sizes = " → ".join(millions(end.params) for end in (cost.original, cost.compact))
    return f"{sizes}, {accuracy.original:.1f} → {getattr(accuracy, stage):.1f} %"


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
