"""A direct implementation of the search and of the Gram matrix, as the baseline of the speed comparison.

It is a fair baseline: float32, the same batches and memory format, one eigendecomposition per side. But every probe
runs the whole network on all images, and the patches of a convolution are written out.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urank.layers import evaluating, matrix_layers, set_weight_matrix, weight_matrix
from urank.plan import LayerRank, Probe, RankPlan, allowed_loss
from urank.subspaces import layer_spectra, project_weight, utilized_rank


def search(model: nn.Module, grams: dict[str, Tensor], batches: list, tolerance: float) -> RankPlan:
    """Return the plan of `search_ranks` in joint mode, with the number of correct images of every probe."""
    network = copy.deepcopy(model)
    layers, probes, entries = matrix_layers(network), [], []
    total = sum(len(labels) for _, labels in batches)
    allowed = allowed_loss(tolerance, total)
    base = correct = count(network, batches)
    for name, gram in grams.items():
        W = weight_matrix(layers[name])
        sides = dict(zip("ST", layer_spectra(gram, W)))
        k = {side: len(spectrum.energy) for side, spectrum in sides.items()}
        for side in sides:
            lo, hi, needed = 1, k[side], correct - allowed
            while lo < hi:
                k[side] = (lo + hi) // 2
                set_weight_matrix(layers[name], project_weight(W, *sides.values(), k["S"], k["T"]))
                right = count(network, batches)
                probes.append(Probe(name, side, k[side], right >= needed, right))
                lo, hi, correct = (lo, k[side], right) if right >= needed else (k[side] + 1, hi, correct)
            k[side] = lo
        projected = project_weight(W, *sides.values(), k["S"], k["T"])
        set_weight_matrix(layers[name], projected)
        ranks = utilized_rank(W), k["S"], k["T"], utilized_rank(projected)
        entries.append(LayerRank(name, *W.shape, *ranks, correct))
    return RankPlan(tuple(entries), tolerance, "joint", total, base, tuple(probes))


def count(network: nn.Module, batches: list) -> int:
    with evaluating(network):
        return sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)


def gram(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Return X^T X of a convolution's patches, written out by `unfold`."""
    X = F.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2).flatten(0, 1)
    X = X.to(torch.float64)
    return X.T @ X
