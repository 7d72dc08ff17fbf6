"""Networks by name: this project's own for 32 x 32 images, and those of torchvision and timm."""

import math
from functools import partial

from torch import nn

from urank.models.libraries import BUILDERS, check_library_name, preprocessing
from urank.models.resnet import BLOCKS, ResNet
from urank.models.transformers import deit, swin, vit
from urank.models.vgg import STAGES, VGG

__all__ = ["NETWORKS", "check_name", "create", "preprocessing"]

# For 32 x 32 images; called with `classes` and `width`.
NETWORKS = (
    {name: partial(VGG, name) for name in STAGES}
    | {name: partial(ResNet, name) for name in BLOCKS}
    | {"vit": vit, "deit": deit, "swin": swin}
)


def create(
    name: str,
    classes: int = 10,
    width: float = 1.0,
    pretrained: bool | str | None = False,
    fetch: bool = True,
    **options,
) -> nn.Module:
    """Build the network called `name` with seeded-by-the-caller random weights, or with published ones.

    >>> create("vgg11", classes=100, width=0.5)
    >>> create("torchvision/vit_b_16", classes=1000, pretrained="IMAGENET1K_V1")
    >>> create("timm/deit_tiny_patch16_224", classes=4, img_size=64)

    Args:
        name: one of `NETWORKS`, or "torchvision/NAME" or "timm/NAME" for an image classifier of these libraries.
        classes: number of logits; published weights have theirs, 1000 for most.
        width: factor on every channel count of one of `NETWORKS`; 1.0 is the published network.
        pretrained: True for the library's default weights, or which: an entry such as "IMAGENET1K_V1" of torchvision,
            a tag such as "fb_in1k" of timm.
        fetch: False for the network that these weights belong to, with random ones in their place.
        options: for the library's own constructor.

    Raises:
        ValueError: unknown name or weights; a number of classes or width that is not positive; what the network does
            not take (a width, options, weights, or a number of classes that its published weights do not have).
        ConnectionError: the published weights cannot be downloaded.
        pickle.UnpicklingError (torchvision), RuntimeError (timm): the file of the weights holds more than tensors.
    """
    check_name(name)
    if classes < 1 or not 0 < width < math.inf:
        raise ValueError(f"{name}: classes ({classes}) and width ({width}) must be positive")
    if name in NETWORKS:
        if pretrained or options:
            raise ValueError(f"{name}: takes classes and width alone; there are no published weights or options of it")
        return NETWORKS[name](classes=classes, width=width)
    if width != 1:
        raise ValueError(f"{name}: has one width, that of its library; leave out width={width}")
    library, _, network = name.partition("/")
    return BUILDERS[library](network, classes, pretrained or False, fetch, options)


def check_name(name: str) -> None:
    """Refuse a name that `create` does not know.

    Raises:
        ValueError: unknown name; the message has the known ones, or of a library's many those spelled like it.
    """
    library, _, network = str(name).partition("/")
    if library in BUILDERS:
        check_library_name(library, network)
    elif name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise ValueError(f"unknown network {name!r}: choose one of {known}, torchvision/NAME or timm/NAME")
