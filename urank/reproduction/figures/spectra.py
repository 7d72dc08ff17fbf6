"""Figure 1: how much of a weight's spectral energy the data use, and the share of its rank that a layer needs."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from urank.reproduction import paper
from urank.reproduction.figures.style import COLORS, STYLE, closed
from urank.reproduction.record import Record, SweepRow


def spectra(record: Record, layers: Sequence[str] | None = None) -> Figure:
    """Draw Figure 1(a): cumulative spectral energy of W (left) and of W' (right) for several layers.

    The horizontal axis is the share of min(d, m) singular values. A line on the right reaches 1 at the layer's
    utilization.

    Args:
        layers: `named_modules()` paths; default five at even distances, first and last included.

    Raises:
        ValueError: the record has no such layer.
    """
    names = list(record.spectra)
    layers = evenly_spaced(names, 5) if layers is None else layers
    for name in set(layers) - set(names):
        raise ValueError(f"the record has no layer {name!r}: it has {', '.join(names)}")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for color, name in zip(cycle(COLORS), layers):
            entry, spectrum = record.plan[name], record.spectra[name]
            label = f"{layer_label(names, name)}: rank {entry.weight_rank} → {entry.rank}"
            for axis, key in zip(axes, ("weight", "projected")):
                energy = cumulative(getattr(spectrum, key))
                axis.plot(np.linspace(0, 1, len(energy)), energy, color=color, lw=1.6, label=label)
        for axis, title in zip(axes, ("trained weight $W$", "projected weight $W' = P_S W P_T$")):
            axis.set(title=title, xlabel="share of singular values", xlim=(0, 1), ylim=(0, 1.02))
        axes[0].set_ylabel("spectral energy held")
        axes[1].legend(title="layer: rank of $W$ → of $W'$", loc="lower right")
    return closed(figure)


def spectra_table(record: Record) -> pd.DataFrame:
    """Return the numbers behind Figure 1(a) as one row: MLU, the least used layer, and the accuracy with every W'.

    `rank = k_T` is the number of layers in which the rank of W' is k_T, so that projecting the inputs lowers no rank.
    """
    plan, least = record.plan, min(record.plan.layers, key=lambda entry: entry.utilization)
    row = {
        "MLU of W %": 100 * plan.weight_mlu,
        "MLU %": 100 * plan.mlu,
        "layers": len(plan.layers),
        "rank = k_T": sum(entry.rank == entry.k_t for entry in plan.layers),
        "least used layer": layer_label(list(record.spectra), least.layer),
        "d x m": f"{least.d} x {least.m}",
        "its rank of W": least.weight_rank,
        "its rank of W'": least.rank,
        "original %": record.accuracy.original,
        "projected %": record.accuracy.projected,
    }
    return pd.DataFrame([row], index=pd.Index([record.experiment.name], name="record"))


def sweep_table(record: Record) -> pd.DataFrame:
    """Return, for each swept layer, the lowest energy threshold tried that costs at most the tolerance.

    Returns:
        Indexed by layer: `energy %`, `k_S` and `of` (d) at that threshold, `||W - W'|| / ||W|| %`, `accuracy kept %` as
        a share of the original's, and what is kept at the threshold that suffices for the paper's layer (section 2.3).
        nan where no threshold is enough, or the paper's was not tried.
    """
    rows = {layer: sweep_row(record, layer) for layer in dict.fromkeys(row.layer for row in record.sweep)}
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="layer"))


def sweep_row(record: Record, layer: str) -> dict[str, float]:
    rows, plan = swept(record, layer).drop(columns="layer").set_index("energy"), record.plan
    enough = rows[rows["correct"] >= plan.least_correct]
    first = enough.iloc[0] if len(enough) else pd.Series(float("nan"), rows.columns, name=float("nan"))
    return {
        "energy %": 100 * first.name,
        "k_S": first["k_s"],
        "of": plan[layer].d,
        "||W - W'|| / ||W|| %": 100 * first["norm_difference"],
        "accuracy kept %": 100 * first["correct"] / plan.correct,
        f"kept at {paper.ENOUGH:g} %": 100 * rows["correct"].get(paper.ENOUGH / 100, float("nan")) / plan.correct,
    }


def cumulative(singular_values: Sequence[float]) -> np.ndarray:
    """Return the share of the spectral energy (n + 1,) that the first k = 0..n singular values hold."""
    energy = np.insert(np.square(singular_values).cumsum(), 0, 0.0)
    return energy / energy[-1]


def evenly_spaced(names: Sequence[str], count: int) -> list[str]:
    """Return `count` of the names at even distances, first and last included.

    >>> evenly_spaced(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]


def layer_label(names: Sequence[str], name: str) -> str:
    return f"{names.index(name) + 1} ({name})"


def energy_sweep(record: Record, layer: str | None = None) -> Figure:
    """Draw Figure 1(b): k_S, accuracy ratio and ||W - W'|| / ||W|| against the input-energy threshold of one layer.

    Colours as in the paper: black k_S (right axis), red accuracy, green norm difference.

    Args:
        layer: one of the layers that the record sweeps; default the first.
    """
    rows = swept(record, layer)
    layer = rows["layer"].iloc[0]
    names, d = list(record.spectra), record.plan[layer].d
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
        red, green = "#C0392B", "#1E8449"
        kept, accuracy = rows["energy"], rows["correct"] / record.plan.correct
        axis.plot(kept, accuracy, "o-", color=red, ms=3.5, label="accuracy / original")
        axis.plot(kept, rows["norm_difference"], "s-", color=green, ms=3.5, label="$\\|W - W'\\| \\,/\\, \\|W\\|$")
        axis.set(xlabel="input spectral energy kept, $e_S$", ylabel="ratio", ylim=(0, 1.06 * max(1, accuracy.max())))
        axis.set_title(f"layer {layer_label(names, layer)}")
        right = axis.twinx()
        right.plot(rows["energy"], rows["k_s"], "k^-", ms=3.5, label=f"$k_S$ (of {d})")
        right.set(ylabel="$k_S$", yscale="log")
        right.spines["right"].set_visible(True)
        right.grid(False)
        lines = axis.get_lines() + right.get_lines()
        figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=3)
    return closed(figure)


def swept(record: Record, layer: str | None) -> pd.DataFrame:
    """Return the rows of the record's energy sweep for `layer`, or for the first swept layer.

    Raises:
        ValueError: the layer was not swept.
    """
    rows = pd.DataFrame(record.sweep, columns=[field.name for field in fields(SweepRow)])
    rows = rows[rows["layer"] == (layer or next(iter(rows["layer"]), None))]
    if rows.empty:
        raise ValueError(f"the record holds no energy sweep of layer {layer!r}; name it in the experiment's `sweep`")
    return rows


def utilization_bars(record: Record) -> Figure:
    """Draw the rank of W (outline) and utilized rank (filled) of every layer, as shares of min(d, m)."""
    frame = record.plan.to_frame()
    available = frame[["d", "m"]].min(axis=1)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 3), layout="constrained")
        places = np.arange(1, len(frame) + 1)
        axis.bar(places, frame["weight_rank"] / available, color="none", edgecolor="#555555", label="rank of $W$")
        axis.bar(places, frame["utilization"], color=COLORS[0], label="utilized rank, rank of $W'$")
        axis.axhline(record.plan.mlu, color=COLORS[1], lw=1.4, label=f"MLU {100 * record.plan.mlu:.0f} %")
        ticks = places[:: 1 + len(places) // 25]  # the numbers of a deep network have to fit
        axis.set(xlabel="layer", ylabel="share of min(d, m)", xticks=ticks, yticks=[0, 0.5, 1], ylim=(0, 1.3))
        axis.legend(ncols=3, loc="upper center")
    return closed(figure)
