"""Estimates of what it takes to measure a row of the paper's tables: the data, and hours from operation counts."""

from functools import cache

import torch

from urank.attention import explicit_attention
from urank.layers import matrix_layers, weight_matrix
from urank.reproduction import paper

SUSTAINED = 1e14  # assumed throughput of a GPU in bfloat16, in floating-point operations per second
TRAIN, VALIDATION = 1_281_167, 50_000  # images of ImageNet


def needs(network: str, dataset: str, side: int) -> str:
    """Return what it takes to measure one of the paper's networks on images of `side` x `side` pixels."""
    if dataset.startswith("cifar"):
        return f"a GPU: urank reproduce --profile cifar --only {dataset}/{network}"
    search, whole = gpu_hours(network, side, 0), gpu_hours(network, side, finetuning_epochs(network))
    return f"ImageNet and about {whole:,.0f} GPU hours, {search:.2g} of them for the search"


def finetuning_epochs(network: str) -> int:
    """Return the epochs that Table 2 prints for a network on ImageNet."""
    return int(paper.table2().iloc[:, int("resnet" in network)]["Epochs"])


def gpu_hours(network: str, side: int, epochs: int) -> float:
    """Return the GPU hours of search and fine-tuning on ImageNet at `SUSTAINED`, without reading images."""
    return operations(network, side, epochs) / SUSTAINED / 3600


def operations(network: str, side: int, epochs: int) -> float:
    """Return the floating-point operations of a search and of `epochs` epochs of training on ImageNet.

    A probe runs all validation images through the network. Training costs three passes per image.
    """
    passes = search_probes(network, side) * VALIDATION + 3 * epochs * TRAIN
    return 2 * paper.original_cost(network, "imagenet-1k", side).macs * passes


@cache
def search_probes(network: str, side: int) -> int:
    """Return the largest number of probes of a search: log2 of d and of m, rounded up, summed over the layers."""
    with torch.device("meta"):
        layers = matrix_layers(explicit_attention(paper.original_network(network, "imagenet-1k", side)))
    shapes = [weight_matrix(layer).shape for layer in layers.values()]
    return sum((size - 1).bit_length() for shape in shapes for size in shape)
