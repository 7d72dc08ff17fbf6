"""urank: the utilized rank of a network's layers.

A trained layer Y = XW looks full rank. Projected onto the subspaces that its real inputs and outputs occupy,
W' = P_S W P_T, it is not. This package measures rank(W'), splits the layer accordingly, and reproduces the figures and
tables of arXiv 2407.04797.
"""

import urank._operators  # noqa: F401  must precede the first import of torchvision or timm
from urank._version import __version__
from urank.attention import explicit_attention
from urank.baselines import energy_rank, output_pca, weight_svd
from urank.calibration import accumulate_grams
from urank.factorize import Cost, count_cost, decompose, load_compact, merge_useless, project_network, save_compact
from urank.layers import coverage, matrix_layers, set_weight_matrix, skipped_layers, weight_matrix
from urank.memory import keep_freed_memory
from urank.models import create
from urank.plan import LayerRank, Probe, RankPlan
from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.search.validation import Validation, evaluate
from urank.shared_layers import separate_uses
from urank.subspaces import (
    Spectrum,
    dimension_for_energy,
    error_bound,
    output_gram,
    project_weight,
    projector,
    utilized_rank,
)
from urank.training.fitting import fit
from urank.training.recipe import Recipe

__all__ = [
    "Cost",
    "LayerRank",
    "Probe",
    "RankPlan",
    "Recipe",
    "Replay",
    "Spectrum",
    "Validation",
    "__version__",
    "accumulate_grams",
    "count_cost",
    "coverage",
    "create",
    "decompose",
    "dimension_for_energy",
    "energy_rank",
    "error_bound",
    "evaluate",
    "explicit_attention",
    "fit",
    "keep_freed_memory",
    "load_compact",
    "matrix_layers",
    "merge_useless",
    "output_gram",
    "output_pca",
    "project_network",
    "project_weight",
    "projector",
    "save_compact",
    "search_ranks",
    "separate_uses",
    "set_weight_matrix",
    "skipped_layers",
    "utilized_rank",
    "weight_matrix",
    "weight_svd",
]
