"""Estimates of what it takes to measure a row of the paper's tables: the data, and GPU hours from operation counts.

The operations per second are those that committed measurements reached on a GPU, so an estimate is for that GPU.
"""

from dataclasses import dataclass
from functools import cache

import torch

from urank.attention import explicit_attention
from urank.layers import matrix_layers
from urank.measure import count_probes
from urank.reproduction import paper, profiles
from urank.reproduction.benchmark_tables import benchmark

TRAIN, VALIDATION = 1_281_167, 50_000  # images of ImageNet


@dataclass(frozen=True)
class Rate:
    """Floating-point operations per second of a GPU, and which measurements they come from."""

    flops: float
    device: str
    measured: str


@cache
def search_rate() -> Rate:
    """Return the rate of the committed searches on a GPU.

    Operations are those of a naive search, which runs every image through the whole network in every probe. The search
    skips most of them, so this rate is not one of the hardware.
    """
    records = [record for record in profiles.recorded() if "NVIDIA" in record.made["search"]["device"]]
    passes = [record.cost.original.macs * len(record.plan.probes) * record.plan.total for record in records]
    seconds = sum(record.seconds["search"] for record in records)
    names = ", ".join(record.experiment.name for record in records)
    return Rate(2 * sum(passes) / seconds, records[0].made["search"]["device"], names)


@cache
def training_rate() -> Rate:
    """Return the highest rate of the committed benchmark of training on a GPU, in bfloat16.

    Training costs three passes per image. The benchmark's networks are small, so the rate is that of steps launched as
    CUDA graphs: large networks keep a GPU busy without them.
    """
    rows = benchmark().query("part == 'training'").dropna(subset="captured")
    macs = rows["what"].map(lambda network: paper.original_cost(network, "cifar10", 32).macs)
    flops = 3 * 2 * macs * rows["captured"]
    best = rows.loc[flops.idxmax()]
    return Rate(flops.max(), best["device"], best["what"])


def needs(network: str, dataset: str, side: int) -> str:
    """Return what it takes to measure one of the paper's networks on images of `side` x `side` pixels."""
    if dataset.startswith("cifar"):
        return f"a GPU: urank reproduce --profile cifar --only {dataset}/{network}"
    macs = paper.original_cost(network, "imagenet-1k", side).macs
    search = search_hours(macs, search_probes(network, side))
    whole = search + training_hours(macs, paper.finetuning_epochs(network))
    return f"ImageNet and about {whole:,.0f} GPU hours, {search:.2g} of them for the search"


def needs_training(macs: int, epochs: float) -> str:
    """Return what it takes to train a network on ImageNet; `macs` per image, nan `epochs` where none are printed."""
    if epochs != epochs:
        return "ImageNet, and a training recipe: the authors' is not known"
    return f"ImageNet and about {training_hours(macs, int(epochs)):,.0f} GPU hours of training"


def search_hours(macs: int, probes: int, images: int = VALIDATION) -> float:
    """Return the GPU hours of a search at `search_rate`; `macs` per image."""
    return 2 * macs * probes * images / search_rate().flops / 3600


def training_hours(macs: int, epochs: int) -> float:
    """Return the GPU hours of training on ImageNet at `training_rate`; `macs` per image."""
    return 3 * 2 * macs * epochs * TRAIN / training_rate().flops / 3600


def basis() -> str:
    """Return a sentence that names the measurements behind the estimates."""
    search, training = search_rate(), training_rate()
    return (
        f"GPU hours are for an {search.device}. They assume the measured {search.flops / 1e12:.0f} TFLOP/s of the "
        f"searches of {search.measured} (operations of a naive search), and {training.flops / 1e12:.0f} TFLOP/s of "
        f"training {training.measured}. The time to read images is not included."
    )


@cache
def search_probes(network: str, side: int) -> int:
    """Return the largest number of probes of a search of all layers."""
    with torch.device("meta"):
        explicit = explicit_attention(paper.original_network(network, "imagenet-1k", side))
    return count_probes(explicit, matrix_layers(explicit))
