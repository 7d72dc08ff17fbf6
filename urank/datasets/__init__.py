"""Data sets by name: rendered digits, CIFAR-10, CIFAR-100 and ImageNet-1k.

`load("digits10")` and `load("digits100")` render images from scikit-learn's handwritten digits and need no files.
`load("cifar10")`, `load("cifar100")` and `load("imagenet-1k")` read files from `data_folder()`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from urank.datasets import cifar, digits, imagenet
from urank.datasets.images import Batches, Dataset, FileSplit, Split, View, data_folder

__all__ = ["CLASSES", "Batches", "Dataset", "FileSplit", "Split", "View", "check_options", "data_folder", "load"]

CLASSES = digits.CLASSES | cifar.CLASSES | imagenet.CLASSES
READERS: dict[str, Callable[..., Dataset]] = {
    **dict.fromkeys(digits.CLASSES, digits.draw_digits),
    **dict.fromkeys(cifar.CLASSES, cifar.read_cifar),
    **dict.fromkeys(imagenet.CLASSES, imagenet.read_imagenet),
}


def load(name: str, **options: Any) -> Dataset:
    """Return a data set by name.

    Args:
        name: one of `CLASSES`.
        options: keyword arguments of `digits.draw_digits`, `cifar.read_cifar` or `imagenet.read_imagenet`.

    >>> dataset = load("digits10", train=100, test=20, seed=1)
    >>> [(tuple(images.shape), tuple(labels.shape)) for images, labels in dataset.batches(dataset.test)]
    [((20, 3, 32, 32), (20,))]

    Raises:
        ValueError: the name is unknown, the data set does not have an option, or a file has invalid content.
        FileNotFoundError, ConnectionError: see `read_cifar` and `read_imagenet`.
    """
    if name not in CLASSES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(CLASSES)}")
    check_options(name, options)
    return READERS[name](name, **options)


def check_options(name: str, options: dict) -> None:
    """Raise ValueError if the data set does not have one of the options."""
    unknown = options.keys() - (inspect.signature(READERS[name]).parameters.keys() - {"name"})
    if unknown:
        raise ValueError(f"{name}: no such option: {', '.join(sorted(unknown))}")
