"""Measure the utilized rank of a network's layers, and decompose each layer to that rank.

A layer is Y = XW. Its inputs X and outputs Y occupy subspaces S and T, which are smaller than the dimensions of W. The
utilized rank is the rank of W' = P_S W P_T, where S and T are as small as the accuracy allows (arXiv 2407.04797).

>>> import torch, urank
>>> _ = torch.manual_seed(0)
>>> network = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> images = torch.randn(200, 3) @ torch.randn(3, 32)  # inputs in a 3-dimensional subspace
>>> grams = urank.accumulate_grams(network, [images], progress=False)  # X^T X of every layer
>>> validation = urank.Validation.agreement(network, [images])  # or batches of (images, labels)
>>> plan = urank.search_ranks(network, grams, validation, tolerance=0.0, progress=False)
>>> plan["0"].weight_rank, plan["0"].rank  # rank of W (32 x 16) and of W'
(16, 3)
>>> compact = urank.decompose(urank.project_network(network, plan, grams), plan)  # two thin layers per layer
"""

import urank._operators  # noqa: F401  must run before torchvision or timm is imported for the first time
from urank._version import __version__
from urank.allocation import allocate_ranks
from urank.attention import explicit_attention
from urank.baselines import energy_rank, output_pca, weight_svd
from urank.calibration import accumulate_grams
from urank.factorize import Cost, count_cost, decompose, load_compact, merge_useless, project_network, save_compact
from urank.layers import coverage, matrix_layers, set_weight_matrix, skipped_layers, weight_matrix
from urank.measure import Measurement, measure
from urank.memory import keep_freed_memory
from urank.models import create
from urank.plan import LayerRank, Probe, RankPlan
from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.search.validation import Validation, evaluate
from urank.shared_layers import Transposed, separate_uses
from urank.subspaces import (
    Spectrum,
    dimension_for_energy,
    error_bound,
    output_gram,
    project_tied_weight,
    project_weight,
    projector,
    share_outside_span,
    utilized_rank,
)
from urank.training.fitting import fit
from urank.training.recipe import Recipe

# The public names in the order in which the method uses them; the API page of the book has the same order.
__all__ = ["measure", "Measurement"]  # the whole method in one call
__all__ += ["matrix_layers", "skipped_layers", "coverage", "explicit_attention", "separate_uses", "Transposed"]
__all__ += ["weight_matrix", "set_weight_matrix"]
# Measure the subspaces:
__all__ += ["accumulate_grams", "output_gram", "Spectrum", "dimension_for_energy", "projector", "project_weight"]
__all__ += ["error_bound", "utilized_rank", "project_tied_weight", "share_outside_span"]
# Search the ranks, or choose them with a baseline:
__all__ += ["search_ranks", "Validation", "Replay", "RankPlan", "LayerRank", "Probe"]
__all__ += ["weight_svd", "output_pca", "energy_rank", "allocate_ranks"]
# Build the compact network:
__all__ += ["project_network", "decompose", "merge_useless", "save_compact", "load_compact", "count_cost", "Cost"]
# Create and train networks:
__all__ += ["create", "Recipe", "fit", "evaluate", "keep_freed_memory", "__version__"]
