"""Networks by name."""

import math
from functools import partial

from torch import nn

from urank.models.vgg import STAGES, VGG

NETWORKS = {name: partial(VGG, name) for name in STAGES}


def create(name: str, classes: int = 10, width: float = 1.0) -> nn.Module:
    """Build the network called `name` with seeded-by-the-caller random weights.

    Args:
        name: one of `NETWORKS`, for example "vgg11".
        classes: number of logits.
        width: factor on every channel count; 1.0 is the published network.

    Raises:
        ValueError: unknown name, or a number of classes or width that is not positive.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    if classes < 1 or not 0 < width < math.inf:
        raise ValueError(f"{name}: classes ({classes}) and width ({width}) must be positive")
    return NETWORKS[name](classes=classes, width=width)
