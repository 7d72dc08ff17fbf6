"""What the experiments on ImageNet take, before any is run: counts, memory, GPU hours, and files that are missing.

Networks are built on the meta device: shapes without weights, and no download.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

from urank.datasets import imagenet
from urank.factorize import count_cost
from urank.layers import matrix_layers, used_layers, weight_matrix
from urank.measure import count_probes
from urank.models.libraries import timm_weights, torchvision_weights
from urank.reproduction import paper
from urank.reproduction.cost_estimates import VALIDATION, search_hours, training_hours
from urank.reproduction.experiment import Experiment, fresh_network, preprocessing_of
from urank.reproduction.preview import stages_left
from urank.reproduction.profiles import Profile, folder_of
from urank.reproduction.run_folder import one_image
from urank.reproduction.stages import stages_of

COLUMNS = ["experiment", "layers", "probes", "GMACs", "memory, GiB", "search, GPU h", "fine-tuning, GPU h", "missing"]
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # names of timm's weights files on the Hugging Face Hub
NOTES = (
    "probes: at most. memory: of the search, with all validation images, without activations. fine-tuning: with the "
    "epochs of Table 2 if the profile has none.\nMissing weights are downloaded when an experiment starts; images must "
    "be in the folder imagenet of URANK_DATA (default: data)."
)


def requirements(profile: Profile, names: Iterable[str], fresh: bool = False) -> pd.DataFrame:
    """Return one row of texts per experiment on ImageNet, for what is left of it; with `fresh` for all of it.

    Returns:
        The columns of `COLUMNS`. `probes` is a maximum, and `GMACs` is per image. Where the profile has no epochs of
        fine-tuning, the hours are for those of Table 2.
    """
    chosen = [name for name in names if profile.find(name).dataset in imagenet.CLASSES]
    bar = tqdm(chosen, "counting operations", unit="network", leave=False, delay=2)
    return pd.DataFrame([dict(experiment=name) | row(profile, name, fresh) for name in bar], columns=COLUMNS)


def row(profile: Profile, name: str, fresh: bool) -> dict[str, str]:
    """Return the row of one experiment."""
    experiment, folder = profile.find(name), folder_of(profile.name, name)
    side, images, epochs = side_of(experiment), validation_images(experiment), experiment.finetune.epochs
    counts = counts_of(experiment, side)
    left = stages_of(experiment) if fresh else stages_left(experiment, folder)
    finetuning = training_hours(counts.macs, epochs or paper.finetuning_epochs(experiment.network))
    texts = [
        str(counts.layers),
        str(counts.probes),
        f"{counts.macs / 1e9:.1f}",
        f"{(counts.bytes + images * 3 * side**2) / 2**30:.1f}",
        f"{search_hours(counts.macs, counts.probes, images):.1f}" if "search" in left else "done",
        f"{finetuning:,.0f}" if "finetune" in left or not epochs else "done",
        ", ".join(missing(experiment, trained="train" not in left)) if left else "",
    ]
    return dict(zip(COLUMNS[1:], texts))


class Counts(NamedTuple):
    """Layers, probes at most, MACs per image, and bytes that a search needs beside its images."""

    layers: int
    probes: int
    macs: int
    bytes: int


def counts_of(experiment: Experiment, side: int) -> Counts:
    """Count on images of `side` x `side` pixels.

    The search keeps two copies of the network in float32, and the Gram matrices in float64.
    """
    with torch.device("meta"):
        built = fresh_network(experiment, fetch=False)
    shape, layers = (3, side, side), matrix_layers(built)
    names, cost = used_layers(built, one_image(built, shape)), count_cost(built, shape)
    grams = sum(len(weight_matrix(layers[name])) ** 2 for name in names)
    return Counts(len(names), count_probes(built, names), cost.macs, 8 * cost.params + 8 * grams)


def side_of(experiment: Experiment) -> int:
    """Return the side of an experiment's images in pixels."""
    default = inspect.signature(imagenet.read_imagenet).parameters["size"].default
    return (dict(size=default) | preprocessing_of(experiment))["size"]


def validation_images(experiment: Experiment) -> int:
    """Return how many images the search uses."""
    return min(experiment.holdout or VALIDATION, experiment.validation or VALIDATION)


def missing(experiment: Experiment, trained: bool) -> list[str]:
    """Return "images" and "weights" if they are not on this machine; a trained network needs no weights."""
    parts = imagenet.missing_parts(experiment.data.get("folder"))
    images = [f"images ({', '.join(parts)})"] if parts else []
    needed = experiment.pretrained is not None and not trained
    return images + ["weights"] * (needed and not is_downloaded(experiment.network, experiment.pretrained))


def is_downloaded(name: str, weights: str) -> bool:
    """Return True if published weights are in the cache of torchvision or timm; nothing is downloaded.

    Args:
        name, weights: as in `models.preprocessing`.
    """
    library, _, network = name.partition("/")
    published: Any = torchvision_weights(network, weights) if library == "torchvision" else None
    published = published or timm_weights(f"{network}.{weights}")
    if hub := getattr(published, "hf_hub_id", None):
        return any(isinstance(try_to_load_from_cache(hub, file), str) for file in HUB_FILES)
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(published.url).name).exists()
