"""Figure 1: how much of a weight's spectral energy the data use, and the share of its rank that a layer needs."""

from collections.abc import Sequence
from dataclasses import fields

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from urank.reproduction import paper
from urank.reproduction.figures.style import GREY, STYLE, WIDTH, closed, heading, network_color, small_multiples
from urank.reproduction.record import Record, SweepRow

QUANTITIES = ("accuracy / original", "$\\|W - W'\\| \\,/\\, \\|W\\|$", "$k_S$")  # of Figure 1(b), from top to bottom


def spectra(record: Record, layers: Sequence[str] | None = None) -> Figure:
    """Draw Figure 1(a): cumulative spectral energy of W (dotted) and of W' (solid), one panel per layer.

    The horizontal axis is the share of min(d, m) singular values. The solid line reaches 1 at the layer's utilization,
    which a dot marks.

    Args:
        layers: `named_modules()` paths; default six at even distances, first and last included.

    Raises:
        ValueError: the record has no such layer.
    """
    names = list(record.spectra)
    layers = evenly_spaced(names, 6) if layers is None else layers
    for name in set(layers) - set(names):
        raise ValueError(f"the record has no layer {name!r}: it has {', '.join(names)}")
    with plt.rc_context(STYLE):
        figure, panels = small_multiples(len(layers), 3, 1.9, sharex=True, sharey=True)
        for axis, name in zip(panels, layers):
            draw_spectra(axis, record, name)
        panels[0].set(xlim=(0, 1.04), ylim=(0, 1.06), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        figure.supxlabel("share of singular values (dotted: $W$; solid: $W'$)")
        figure.supylabel("spectral energy held")
        figure.suptitle(heading(record))
    return closed(figure)


def draw_spectra(axis: Axes, record: Record, layer: str) -> None:
    """Draw the energy held by the first singular values of one layer's W and W', and name both ranks."""
    entry, spectrum = record.plan[layer], record.spectra[layer]
    color = network_color(record.experiment.network)
    for values, line in ((spectrum.weight, ":"), (spectrum.projected, "-")):
        energy = cumulative(values)
        axis.plot(np.linspace(0, 1, len(energy)), energy, line, color=color, lw=1.8)
    axis.plot([entry.utilization], [1], "o", color=color, ms=4)
    axis.text(0.98, 0.08, f"rank {entry.weight_rank} → {entry.rank}", ha="right", transform=axis.transAxes)
    axis.set_title(layer_label(list(record.spectra), layer))


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


def energy_sweep(record: Record, layers: Sequence[str] | None = None) -> Figure:
    """Draw Figure 1(b): accuracy ratio, ||W - W'|| / ||W|| and k_S against the share of input energy that is kept.

    One column per layer; the three quantities are stacked on one axis of energy. Grey marks the share that is enough in
    the paper.

    Args:
        layers: of those that the record sweeps; default all.

    Raises:
        ValueError: a layer was not swept.
    """
    layers = list(dict.fromkeys(row.layer for row in record.sweep)) if layers is None else layers
    sweeps = [swept(record, layer) for layer in layers or [None]]
    with plt.rc_context(STYLE):
        shape = dict(figsize=(WIDTH, 5), sharex=True, sharey="row", squeeze=False)
        figure, axes = plt.subplots(len(QUANTITIES), len(sweeps), **shape)
        for column, rows in zip(axes.T, sweeps):
            draw_sweep(column, record, rows)
        for axis, name in zip(axes[:, 0], QUANTITIES):
            axis.set_ylabel(name)
        axes[0, 0].set_ylim(0, None)
        axes[1, 0].set_ylim(0, None)
        axes[2, 0].set_yscale("log")
        figure.align_ylabels()
        figure.supxlabel("share of the input energy kept, $e_S$")
        figure.suptitle(heading(record))
    return closed(figure)


def draw_sweep(column: Sequence[Axes], record: Record, rows: pd.DataFrame) -> None:
    """Draw the three quantities of one layer's sweep, from top to bottom."""
    layer, color = rows["layer"].iloc[0], network_color(record.experiment.network)
    for axis, values in zip(column, (rows["correct"] / record.plan.correct, rows["norm_difference"], rows["k_s"])):
        axis.axvline(paper.ENOUGH / 100, color=GREY, lw=1, ls="--")
        axis.plot(rows["energy"], values, "o-", color=color, ms=3.5)
    column[0].set_title(f"layer {layer_label(list(record.spectra), layer)}")
    column[1].text(paper.ENOUGH / 100 - 0.01, 0.05, "enough in the paper", color=GREY, ha="right")
    column[2].text(0.04, 0.85, f"$d$ = {record.plan[layer].d}", transform=column[2].transAxes)


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
