"""Figure 1: how much of a weight's spectral energy the data use, and the share of its rank that a layer needs."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from urank.reproduction import paper
from urank.reproduction.figures.style import COLORS, STYLE, closed
from urank.reproduction.record import Record


def spectra(record: Record, layers: Sequence[str] | None = None) -> Figure:
    """Figure 1(a): cumulative spectral energy of W (left) and of W' (right) for several layers.

    The horizontal axis is the share of min(d, m) singular values; where a line on the right reaches 1 is the
    layer's utilization.

    Args:
        layers: their `named_modules()` paths; default five at even distances, first and last included.
    """
    names = list(record["spectra"])
    layers = spread(names, 5) if layers is None else layers
    for name in set(layers) - set(names):
        raise ValueError(f"the record has no layer {name!r}: it has {', '.join(names)}")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for color, name in zip(cycle(COLORS), layers):
            entry, spectrum = record.plan[name], record["spectra"][name]
            label = f"{layer_label(names, name)}: rank {entry.weight_rank} → {entry.rank}"
            for axis, key in zip(axes, ("weight", "projected")):
                energy = cumulative(spectrum[key])
                axis.plot(np.linspace(0, 1, len(energy)), energy, color=color, lw=1.6, label=label)
        for axis, title in zip(axes, ("trained weight $W$", "projected weight $W' = P_S W P_T$")):
            axis.set(title=title, xlabel="share of singular values", xlim=(0, 1), ylim=(0, 1.02))
        axes[0].set_ylabel("spectral energy held")
        axes[1].legend(title="layer: rank of $W$ → of $W'$", loc="lower right")
    return closed(figure)


def spectra_caption(record: Record) -> str:
    """What Figure 1(a) of this record says, in one paragraph of Markdown."""
    plan = record.plan
    least = min(plan.layers, key=lambda entry: entry.utilization)
    names = list(record["spectra"])
    return (
        f"Mean layer utilization: **{100 * plan.weight_mlu:.0f} %** of $W$, **{100 * plan.mlu:.0f} %** of $W'$. "
        f"The least used layer is {layer_label(names, least.layer)}, {least.d} x {least.m}: "
        f"rank {least.weight_rank} of $W$, {least.rank} of $W'$. {which_side_decides(record)} "
        f"With every $W'$ in place {record['accuracy']['projected']:.2f} % of the test images are classified "
        f"correctly, {record['accuracy']['original']:.2f} % with every $W$."
    )


def which_side_decides(record: Record) -> str:
    """In how many layers the rank of W' is k_T, so that projecting the inputs lowers no rank."""
    layers = record.plan.layers
    count = sum(entry.rank == entry.k_t for entry in layers)
    return f"In {count} of {len(layers)} layers the rank of $W'$ is $k_T$: there projecting the inputs lowers no rank."


def sweep_caption(record: Record, layer: str) -> str:
    """What Figure 1(b) of this record says of a layer: the least energy that costs no more than the tolerance."""
    rows, entry, plan = swept(record, layer), record.plan[layer], record.plan
    enough = rows[rows["correct"] >= plan.least_correct]
    if enough.empty:
        return (
            f"No threshold up to {100 * rows['energy'].max():g} % keeps the accuracy within {plan.tolerance:g} points."
        )
    first = enough.iloc[0]
    return (
        f"The lowest threshold tried that costs at most {plan.tolerance:g} points is {100 * first['energy']:g} % of "
        f"the input energy: $k_S$ = {first['k_s']} of {entry.d} directions, $\\|W - W'\\|$ at "
        f"{100 * first['norm_difference']:.0f} % of $\\|W\\|$, {100 * first['correct'] / plan.correct:.1f} % of the "
        f"accuracy kept.{at_enough(rows, plan.correct, first['energy'])}"
    )


def at_enough(rows: pd.DataFrame, correct: int, found: float) -> str:
    """What is kept of the accuracy at the energy that was enough for the layer the paper shows; "" if not tried.

    Args:
        found: the energy that is enough for the layer of `rows`.
    """
    kept = rows.set_index("energy")["correct"].get(paper.ENOUGH / 100)
    if kept is None:
        return ""
    if found == paper.ENOUGH / 100:
        return " The same was enough for the paper's layer."
    return (
        f" At {paper.ENOUGH:g} %, enough for the paper's layer, {100 * kept / correct:.1f} % of the accuracy is kept."
    )


def cumulative(singular_values: Sequence[float]) -> np.ndarray:
    """Share of the spectral energy (n + 1,) that the first k = 0..n singular values hold."""
    energy = np.insert(np.square(singular_values).cumsum(), 0, 0.0)
    return energy / energy[-1]


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names at even distances, first and last included."""
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]


def layer_label(names: Sequence[str], name: str) -> str:
    return f"{names.index(name) + 1} ({name})"


def energy_sweep(record: Record, layer: str | None = None) -> Figure:
    """Figure 1(b): k_S, accuracy ratio and ||W - W'|| / ||W|| against the input-energy threshold of one layer.

    Colours as in the paper: black k_S (right axis), red accuracy, green norm difference.

    Args:
        layer: one of the layers the record sweeps; default the first.
    """
    rows = swept(record, layer)
    layer = rows["layer"].iloc[0]
    names, d = list(record["spectra"]), record.plan[layer].d
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
    """The rows of the record's energy sweep that belong to `layer`, the first one swept for None."""
    rows = pd.DataFrame(record["sweep"], columns=["layer", "energy", "k_s", "correct", "norm_difference"])
    rows = rows[rows["layer"] == (layer or next(iter(rows["layer"]), None))]
    if rows.empty:
        raise ValueError(f"the record holds no energy sweep of layer {layer!r}; name it in the experiment's `sweep`")
    return rows


def utilization_bars(record: Record) -> Figure:
    """Rank of W (outline) and utilized rank (filled) of every layer, as shares of min(d, m)."""
    frame = record.plan.to_frame()
    available = frame[["d", "m"]].min(axis=1)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 3), layout="constrained")
        places = np.arange(1, len(frame) + 1)
        axis.bar(places, frame["weight_rank"] / available, color="none", edgecolor="#555555", label="rank of $W$")
        axis.bar(places, frame["utilization"], color=COLORS[0], label="utilized rank, rank of $W'$")
        axis.axhline(record.plan.mlu, color=COLORS[1], lw=1.4, label=f"MLU {100 * record.plan.mlu:.0f} %")
        ticks = places[:: 1 + len(places) // 30]  # of a deep network every second number, or fewer: they have to fit
        axis.set(xlabel="layer", ylabel="share of min(d, m)", xticks=ticks, yticks=[0, 0.5, 1], ylim=(0, 1.3))
        axis.legend(ncols=3, loc="upper center")
    return closed(figure)
