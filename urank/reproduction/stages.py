"""What the stages of an experiment compute, in the order of `STAGES`; see `work` for how they go on."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from urank.calibration import accumulate_grams
from urank.distributed import processes
from urank.factorize import decompose, load_compact, merge_useless, project_network, save_compact
from urank.files import write_tensors, write_weights
from urank.layers import evaluating, matrix_layers, set_weight_matrix, used_layers, weight_matrix
from urank.numerics import has_fast_bfloat16, singular_values
from urank.reproduction.experiment import Experiment
from urank.reproduction.provenance import describe
from urank.reproduction.run_folder import SMALL, Work, head_of, one_image
from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.search.validation import Validation, evaluate
from urank.subspaces import Spectrum, dimension_for_energy, layer_spectra, project_weight
from urank.throughput import images_per_second

ENERGIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
BATCH_SIZES = (1, 256)  # at which the networks are timed


def _train(work: Work) -> dict:
    network = work.initial()
    part = head_of(network, work.dataset.image_shape) if work.experiment.trainable == "head" else ""
    history = work.fit(network, work.experiment.train, "train", part)
    write_weights(work.folder / "original.safetensors", network)
    return dict(history=history, accuracy=evaluate(network, work.test), cost=work.cost(network))


def _calibrate(work: Work) -> dict:
    network = work.original()
    used = used_layers(network, one_image(network, work.dataset.image_shape))  # not what only training needs
    grams = accumulate_grams(network, work.calibration, used, progress=work.progress)
    write_tensors(work.folder / "grams.safetensors", grams)
    return dict(layers=list(grams), images=len(work.calibration.split))


def _search(work: Work) -> dict:
    experiment, grams = work.experiment, work.grams()
    searched = grams if experiment.order == "forward" else dict(reversed(grams.items()))
    plan = search_ranks(
        work.original(),
        searched,
        work.validation,
        experiment.tolerance,
        experiment.mode,
        progress=work.progress,
        checkpoint=work.folder / "search.ckpt",
        deadline=work.deadline,
    ).in_order(grams)
    return dict(plan=plan.to_dict(), mlu=plan.mlu, weight_mlu=plan.weight_mlu)


def _decompose(work: Work) -> dict:
    projected = project_network(work.original(), work.plan(), work.grams())
    compact = decompose(projected, work.plan())
    save_compact(compact, work.plan(), work.folder / "decomposed")
    return dict(projected=evaluate(projected, work.test), accuracy=evaluate(compact, work.test))


def _finetune(work: Work) -> dict:
    plan, original = work.plan(), work.original()
    compact = load_compact(original, work.folder / "decomposed").to(work.device)
    history = work.fit(compact, work.experiment.finetune, "finetune")
    save_compact(compact, plan, work.folder / "finetuned")
    merged = merge_useless(compact, original, plan)
    return dict(
        history=history,
        accuracy=evaluate(compact, work.test),
        merged_accuracy=evaluate(merged, work.test),
        cost=work.cost(merged),
        split_cost=work.cost(compact),
    )


def _baseline(work: Work) -> dict:
    """The original network, given the same further training as the compact one."""
    network = work.original()
    history = work.fit(network, work.experiment.finetune, "baseline")
    return dict(history=history, accuracy=evaluate(network, work.test))


def _latency(work: Work) -> dict:
    """Images a second of the original and of the compact network, small images on the processor, too, beside a GPU."""
    networks = dict(original=work.original(), compact=work.merged())
    images, _ = next(iter(work.dataset.batches(work.test.split, max(BATCH_SIZES))))
    quick = images[0].numel() <= SMALL and processes()[1] == 1
    devices = dict.fromkeys((work.device, torch.device("cpu")) if quick else (work.device,))
    return dict(rows=[row for device in devices for row in latency_rows(networks, images, device)])


def latency_rows(networks: dict[str, nn.Module], images: Tensor, device: torch.device) -> list[dict]:
    """A row for each network, batch size and precision on `device`; float32 never means TF32."""
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


def _spectra(work: Work) -> dict:
    """Singular values of W, W', X and Y of every layer, as Figure 1(a) draws them."""
    plan, grams, spectra = work.plan(), work.grams(), {}
    layers = matrix_layers(work.original())
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
    """Six significant digits are more than a figure shows and keep a record small."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _sweep(work: Work) -> dict:
    """k_S, accuracy and ||W - W'|| / ||W|| against the input energy, a layer at a time, as in Figure 1(b).

    W' = P_S W here: the output side is left alone.
    """
    if not work.experiment.sweep:
        return dict(rows=[])
    network, grams = work.original(), work.grams()
    layers, replay = matrix_layers(network), Replay(network, Validation(work.validation))
    rows = []
    with evaluating(network):
        for name in (name for name in grams if name in work.experiment.sweep):
            replay.advance(layers[name])
            rows += [dict(layer=name) | row for row in sweep_layer(layers[name], grams[name], replay)]
    return dict(rows=rows)


def sweep_layer(layer, gram: Tensor, replay: Replay) -> list[dict]:
    """One row (energy, k_s, correct, norm_difference) for each of `ENERGIES`; the layer's weight comes back."""
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


STAGES: dict[str, Callable[[Work], dict]] = dict(
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
    """The stages of an experiment; a baseline that would be fitted for no epoch is the original itself."""
    with_baseline = experiment.baseline and experiment.finetune.epochs > 0
    return [name for name in STAGES if with_baseline or name != "baseline"]
