"""Networks by name: small ones for 32 x 32 images, defined in this package, and those of torchvision and timm."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from urank.models.libraries import BUILDERS, check_library_name, preprocessing
from urank.models.parameter_efficient import resnet29_pe, vit_pe
from urank.models.resnet import BLOCKS, ResNet
from urank.models.transformers import deit, swin, vit
from urank.models.vgg import STAGES, VGG

__all__ = ["NETWORKS", "check_name", "create", "preprocessing"]

# Networks for 32 x 32 images, called with `classes` and `width`.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(VGG, name) for name in STAGES},
    **{name: partial(ResNet, name) for name in BLOCKS},
    "vit": vit,
    "deit": deit,
    "swin": swin,
    "vit_pe": vit_pe,
    **{f"resnet29_pe{tied}": partial(resnet29_pe, tied) for tied in (1, 2)},
}


def create(
    name: str,
    classes: int = 10,
    width: float = 1.0,
    pretrained: bool | str | None = False,
    fetch: bool = True,
    **options: Any,
) -> nn.Module:
    """Build a network by name, with random weights or with published ones.

    Random weights depend on the global seed, `torch.manual_seed`.

    Args:
        name: one of `NETWORKS`, or "torchvision/NAME" or "timm/NAME" for an image classifier of these libraries.
        classes: number of classes; it must match the published weights (1000 for most).
        width: factor on every channel count of one of `NETWORKS`; 1.0 is the published network.
        pretrained: True for the library's default weights, or a name: an entry such as "IMAGENET1K_V1" for torchvision,
            a tag such as "fb_in1k" for timm.
        fetch: False to build the network for these weights without downloading them; its weights are then random.
        options: keyword arguments for the library's constructor; for "vit" and "vit_pe", of timm's `VisionTransformer`.

    >>> network = create("vgg11", classes=100, width=0.5)
    >>> sum(parameter.numel() for parameter in network.parameters())
    2334692
    >>> create("timm/deit_tiny_patch16_224", classes=4, img_size=64).head
    Linear(in_features=192, out_features=4, bias=True)

    Raises:
        ValueError: the name or the weights are unknown, `classes` or `width` is not positive, the network does not
            support an argument, or `classes` does not match the published weights.
        ConnectionError: the published weights cannot be downloaded.
        pickle.UnpicklingError (torchvision), RuntimeError (timm): the weights file contains other objects than tensors.
    """
    check_name(name)
    if classes < 1 or not 0 < width < math.inf:
        raise ValueError(f"{name}: classes ({classes}) and width ({width}) must be positive")
    if name in NETWORKS:
        if pretrained or (options and name not in ("vit", "vit_pe")):
            raise ValueError(
                f"{name}: only classes and width can be set; there are no published weights or other options"
            )
        return NETWORKS[name](classes=classes, width=width, **options)
    if width != 1:
        raise ValueError(f"{name}: the width of a library's network is fixed; remove width={width}")
    library, _, network = name.partition("/")
    return BUILDERS[library](network, classes, pretrained or False, fetch, options)


def check_name(name: str) -> None:
    """Check that `create` can build the network.

    Raises:
        ValueError: the name is unknown; the message lists the known names, or similar ones of a library.
    """
    library, _, network = str(name).partition("/")
    if library in BUILDERS:
        check_library_name(library, network)
    elif name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise ValueError(f"unknown network {name!r}: choose one of {known}, torchvision/NAME or timm/NAME")
