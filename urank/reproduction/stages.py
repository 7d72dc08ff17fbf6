"""The stages of an experiment, in the order of `STAGES`: train, calibrate, search, decompose, fine-tune, measure.

`run_folder` tells how their results are kept.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from urank.calibration import accumulate_grams
from urank.distributed import processes
from urank.factorize import decompose, load_compact, merge_useless, project_network, save_compact
from urank.files import write_tensors, write_weights
from urank.layers import evaluating, matrix_layers, set_weight_matrix, used_layers, weight_matrix
from urank.numerics import describe, has_fast_bfloat16, singular_values
from urank.reproduction.experiment import Experiment
from urank.reproduction.run_folder import SMALL_IMAGE, RunFolder, head_of, one_image
from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.search.validation import Validation, evaluate
from urank.subspaces import Spectrum, dimension_for_energy, layer_spectra, project_weight
from urank.throughput import images_per_second

ENERGIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
BATCH_SIZES = (1, 256)  # of the throughput measurement


def _train(run: RunFolder) -> dict:
    network = run.initial()
    part = head_of(network, run.dataset.image_shape) if run.experiment.trainable == "head" else ""
    history = run.fit(network, run.experiment.train, "train", part)
    write_weights(run.folder / "original.safetensors", network)
    return dict(history=history, accuracy=evaluate(network, run.test), cost=run.cost(network))


def _calibrate(run: RunFolder) -> dict:
    network = run.original()
    used = used_layers(network, one_image(network, run.dataset.image_shape))  # without layers that only training uses
    grams = accumulate_grams(network, run.calibration, used, progress=run.progress)
    write_tensors(run.folder / "grams.safetensors", grams)
    return dict(layers=list(grams), images=len(run.calibration.split))


def _search(run: RunFolder) -> dict:
    experiment, grams = run.experiment, run.grams()
    searched = grams if experiment.order == "forward" else dict(reversed(grams.items()))
    plan = search_ranks(
        run.original(),
        searched,
        run.validation,
        experiment.tolerance,
        experiment.mode,
        progress=run.progress,
        checkpoint=run.folder / "search.ckpt",
        deadline=run.deadline,
    ).in_order(grams)
    return dict(plan=plan.to_dict(), mlu=plan.mlu, weight_mlu=plan.weight_mlu)


def _decompose(run: RunFolder) -> dict:
    projected = project_network(run.original(), run.plan(), run.grams())
    compact = decompose(projected, run.plan())
    save_compact(compact, run.plan(), run.folder / "decomposed")
    return dict(projected=evaluate(projected, run.test), accuracy=evaluate(compact, run.test))


def _finetune(run: RunFolder) -> dict:
    plan, original = run.plan(), run.original()
    compact = load_compact(original, run.folder / "decomposed").to(run.device)
    history = run.fit(compact, run.experiment.finetune, "finetune")
    save_compact(compact, plan, run.folder / "finetuned")
    merged = merge_useless(compact, original, plan)
    return dict(
        history=history,
        accuracy=evaluate(compact, run.test),
        merged_accuracy=evaluate(merged, run.test),
        cost=run.cost(merged),
        split_cost=run.cost(compact),
    )


def _baseline(run: RunFolder) -> dict:
    """Fine-tune the full-rank network by the same recipe as the compact one."""
    network = run.original()
    history = run.fit(network, run.experiment.finetune, "baseline")
    return dict(history=history, accuracy=evaluate(network, run.test))


def _latency(run: RunFolder) -> dict:
    """Measure images/s of the original and the compact network; for small images also on the CPU of a GPU machine."""
    networks = dict(original=run.original(), compact=run.merged())
    images, _ = next(iter(run.dataset.batches(run.test.split, max(BATCH_SIZES))))
    quick = images[0].numel() <= SMALL_IMAGE and processes()[1] == 1
    devices = dict.fromkeys((run.device, torch.device("cpu")) if quick else (run.device,))
    return dict(rows=[row for device in devices for row in latency_rows(networks, images, device)])


def latency_rows(networks: dict[str, nn.Module], images: Tensor, device: torch.device) -> list[dict]:
    """Return one row per network, batch size and precision on `device`; float32 never means TF32."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_fast_bfloat16(device)]:
        typed = {name: copy.deepcopy(network).to(device, dtype) for name, network in networks.items()}
        for size in BATCH_SIZES:
            batch = images[torch.arange(size) % len(images)].to(device, dtype, memory_format=torch.channels_last)
            where = dict(batch=size, device=describe(device), precision=str(dtype).removeprefix("torch."))
            rows += [
                dict(network=name, images_per_second=float(f"{speed:.4g}")) | where
                for name, speed in images_per_second(typed, batch).items()
            ]
    return rows


def _spectra(run: RunFolder) -> dict:
    """Compute the singular values of W, W', X and Y of every layer (Figure 1(a))."""
    plan, grams, spectra = run.plan(), run.grams(), {}
    layers = matrix_layers(run.original())
    for entry in plan.layers:
        W, gram = weight_matrix(layers[entry.layer]), grams[entry.layer]
        inputs, outputs = layer_spectra(gram, W)
        projected = project_weight(W, inputs, outputs, entry.k_s, entry.k_t)
        spectra[entry.layer] = dict(
            weight=digits(singular_values(W)),
            projected=digits(singular_values(projected)),
            inputs=digits(inputs.eigenvalues.sqrt()),
            outputs=digits(outputs.eigenvalues.sqrt()),
        )
    return dict(layers=spectra)


def digits(values: Tensor) -> list[float]:
    """Round to six significant digits, which is more than a figure shows and keeps a record small."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _sweep(run: RunFolder) -> dict:
    """Vary the input energy of one layer at a time and measure k_S, accuracy and ||W - W'|| / ||W|| (Figure 1(b)).

    Only the input side is projected: W' = P_S W.
    """
    if not run.experiment.sweep:
        return dict(rows=[])
    network, grams = run.original(), run.grams()
    layers, replay = matrix_layers(network), Replay(network, Validation(run.validation))
    rows = []
    with evaluating(network):
        for name in (name for name in grams if name in run.experiment.sweep):
            replay.advance(layers[name])
            rows += [dict(layer=name) | row for row in sweep_layer(layers[name], grams[name], replay)]
    return dict(rows=rows)


def sweep_layer(layer, gram: Tensor, replay: Replay) -> list[dict]:
    """Return one row (energy, k_s, correct, norm_difference) per entry of `ENERGIES`; the layer is not changed."""
    W, inputs = weight_matrix(layer), Spectrum.of(gram)
    rows = []
    for energy in ENERGIES:
        k_s = dimension_for_energy(inputs, energy)
        projected = project_weight(W, inputs, inputs, k_s, W.shape[1])
        set_weight_matrix(layer, projected)
        correct = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in replay)
        difference = torch.linalg.matrix_norm(W - projected) / torch.linalg.matrix_norm(W)
        rows.append(dict(energy=energy, k_s=k_s, correct=correct, norm_difference=difference.item()))
    set_weight_matrix(layer, W)
    return rows


STAGES: dict[str, Callable[[RunFolder], dict]] = dict(
    train=_train,
    calibrate=_calibrate,
    search=_search,
    spectra=_spectra,
    sweep=_sweep,
    decompose=_decompose,
    finetune=_finetune,
    baseline=_baseline,
    latency=_latency,
)


def stages_of(experiment: Experiment) -> list[str]:
    """Return the names of an experiment's stages; without fine-tuning there is no baseline to fine-tune."""
    with_baseline = experiment.baseline and experiment.finetune.epochs > 0
    return [name for name in STAGES if with_baseline or name != "baseline"]
