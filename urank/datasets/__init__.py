"""Images by name: digits that ship inside scikit-learn, CIFAR and ImageNet from a folder.

`load("digits10")` and `load("digits100")` draw small scenes around scikit-learn's handwritten digits and need no file;
`load("cifar10")`, `load("cifar100")` and `load("imagenet-1k")` read the folder `data_folder()`.
"""

import inspect

from urank.datasets import cifar, digits, imagenet
from urank.datasets.images import Batches, Dataset, FileSplit, Split, View, data_folder

__all__ = ["CLASSES", "Batches", "Dataset", "FileSplit", "Split", "View", "check_options", "data_folder", "load"]

CLASSES = digits.CLASSES | cifar.CLASSES | imagenet.CLASSES
READERS = (
    dict.fromkeys(digits.CLASSES, digits.draw_digits)
    | dict.fromkeys(cifar.CLASSES, cifar.read_cifar)
    | dict.fromkeys(imagenet.CLASSES, imagenet.read_imagenet)
)


def load(name: str, **options) -> Dataset:
    """The data set called `name`, one of `CLASSES`.

    >>> dataset = load("digits100", train=10_000, seed=1)
    >>> for images, labels in dataset.batches(dataset.test): ...

    Args:
        options: of `digits.draw_digits`, `cifar.read_cifar` or `imagenet.read_imagenet`.

    Raises:
        ValueError: another name, an option that the data set does not have, or files with bad content.
        FileNotFoundError, ConnectionError: see `read_cifar` and `read_imagenet`.
    """
    if name not in CLASSES:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(CLASSES)}")
    check_options(name, options)
    return READERS[name](name, **options)


def check_options(name: str, options: dict) -> None:
    """Refuse an option that the data set called `name` does not have."""
    unknown = options.keys() - (inspect.signature(READERS[name]).parameters.keys() - {"name"})
    if unknown:
        raise ValueError(f"{name}: no such option: {', '.join(sorted(unknown))}")
