"""What measuring a row of the paper's tables would take: data, and hours estimated from the operations."""

from collections.abc import Sequence
from functools import cache

import torch

from urank.attention import explicit_attention
from urank.layers import matrix_layers, weight_matrix
from urank.reproduction import paper, profiles
from urank.reproduction.experiment import Experiment
from urank.reproduction.figures.selection import family, family_of, without_variants
from urank.reproduction.figures.tables import devices
from urank.reproduction.record import Record

SUSTAINED = 1e14  # floating-point operations a second that a GPU is taken to sustain in bfloat16
# Training and validation images.
IMAGES = {"imagenet-1k": (1_281_167, 50_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}


def needs(network: str, dataset: str, side: int, records: Sequence[Record] = ()) -> str:
    """What measuring a network of the paper on images of `side` x `side` pixels would take.

    Args:
        records: of networks of full width; they tell how fast the device that they were made on is.
    """
    if dataset.startswith("cifar"):
        name = f"{dataset}/{network}"
        experiment = profiles.load_profile("cifar").find(name)
        return f"a GPU{hours_at_measured_pace(experiment, records)}: urank reproduce --profile cifar --only {name}"
    search, whole = gpu_hours(network, side, 0), gpu_hours(network, side, finetuning_epochs(network))
    return f"ImageNet and about {whole:,.0f} GPU hours, {search:.2g} of them for the search"


def hours_at_measured_pace(experiment: Experiment, records: Sequence[Record]) -> str:
    """For how long an experiment on CIFAR would occupy the device that ran one of its family; "" where none was run."""
    relatives = [record for record in without_variants(records) if related(record, experiment)]
    if not relatives:
        return ""
    measured = min(relatives, key=lambda record: record["experiment"]["dataset"] != experiment.dataset)
    longer = operations_of(experiment) / operations_of(measured.experiment)
    minutes = longer * sum(measured["seconds"].values()) / 60
    time = f"{minutes / 60:,.0f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
    return f", or about {time} of {devices([measured])}"


def related(record: Record, experiment: Experiment) -> bool:
    """Whether a record is of a network of the same family, on all images of CIFAR."""
    on_cifar = record["experiment"]["dataset"].startswith("cifar") and not record["experiment"]["data"]
    return on_cifar and family(record) == family_of(experiment.network)


def operations_of(experiment: Experiment) -> float:
    """Floating-point operations of an experiment on CIFAR: training, search, fine-tuning and the baseline's."""
    epochs = experiment.train.epochs + experiment.finetune.epochs * (1 + experiment.baseline)
    return operations(experiment.network, experiment.dataset, 32, epochs)


def finetuning_epochs(network: str) -> int:
    """As Table 2 prints them for networks on ImageNet."""
    return int(paper.table2().iloc[:, int("resnet" in network)]["Epochs"])


def gpu_hours(network: str, side: int, epochs: int) -> float:
    """GPU hours of search and fine-tuning on ImageNet, at `SUSTAINED` operations a second; images not counted."""
    return operations(network, "imagenet-1k", side, epochs) / SUSTAINED / 3600


def operations(network: str, dataset: str, side: int, epochs: int) -> float:
    """Floating-point operations of a search and of `epochs` epochs of training.

    A probe of the search runs all validation images through the network; an image costs three passes in training.
    """
    train, validation = IMAGES[dataset]
    passes = search_probes(network, dataset, side) * validation + 3 * epochs * train
    return 2 * paper.original_cost(network, dataset, side).macs * passes


@cache
def search_probes(network: str, dataset: str, side: int) -> int:
    """How often the search asks for the accuracy at most: log2 of d and of m, rounded up, for each layer."""
    with torch.device("meta"):
        layers = matrix_layers(explicit_attention(paper.original_network(network, dataset, side)))
    shapes = [weight_matrix(layer).shape for layer in layers.values()]
    return sum((size - 1).bit_length() for shape in shapes for size in shape)
