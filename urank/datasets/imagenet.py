"""ImageNet-1k from the folders train/ and val/, each with one folder of images per class."""

import os
from pathlib import Path

from torchvision.datasets import ImageFolder

from urank.datasets.folders import shuffled_split
from urank.datasets.images import Dataset, View, data_folder

CLASSES = {"imagenet-1k": 1000}
PARTS = ("train", "val")
MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet's pixels; published networks are trained with these values


def read_imagenet(
    name: str,
    folder: Path | str | None = None,
    size: int = 224,
    resize: int = 256,
    interpolation: str = "bilinear",
    squash: bool = False,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Dataset:
    """Return ImageNet-1k; the validation images of ImageNet are the `test` split.

    `folder`/train and `folder`/val each contain one folder per class, named by its WordNet id. Classes are numbered in
    the order of these ids, as in published networks. The images of each split are in a fixed random order, so a subset
    from the front is a random sample. Images are read when they are used.

    `models.preprocessing` returns the options for published weights.

    Args:
        name: "imagenet-1k".
        folder: default: `data_folder()`/imagenet.
        size, resize, interpolation, squash: see `View`.
        mean, std: mean and standard deviation per channel, where 1 is the full pixel range.

    Raises:
        FileNotFoundError: the folder does not exist, or a class has no images.
        ValueError: there are not 1000 classes, or train/ and val/ have different classes.
    """
    folder = imagenet_folder(folder)
    parts = [image_folder(folder / part) for part in PARTS]
    classes, needed = parts[0].classes, CLASSES[name]
    if not len(classes) == needed == len(set(classes) & set(parts[1].classes)) == len(parts[1].classes):
        raise ValueError(
            f"{folder}: train/ and val/ must contain the same {needed} folders, one per class; they have "
            f"{len(classes)} and {len(parts[1].classes)}"
        )
    view = View(size, resize, interpolation, squash)
    train, test = (shuffled_split([path for path, _ in part.samples], part.targets, view) for part in parts)
    return Dataset(name, needed, train, test, tuple(mean), tuple(std))


def missing_parts(folder: Path | str | None = None) -> list[str]:
    """Return which of train/ and val/ do not contain one folder per class; no image is read.

    Args:
        folder: default: `data_folder()`/imagenet.
    """
    folder = imagenet_folder(folder)
    return [part for part in PARTS if folders_in(folder / part) != CLASSES["imagenet-1k"]]


def folders_in(folder: Path) -> int:
    """Return the number of folders in a folder, 0 if it does not exist."""
    return sum(entry.is_dir() for entry in os.scandir(folder)) if folder.is_dir() else 0


def imagenet_folder(folder: Path | str | None) -> Path:
    """Return the folder of train/ and val/."""
    return data_folder() / "imagenet" if folder is None else Path(folder)


def image_folder(folder: Path) -> ImageFolder:
    """Return the images in a folder with one folder per class."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; put ImageNet's images there, one folder per class, or set URANK_DATA to the "
            f"folder that contains imagenet/train and imagenet/val"
        )
    return ImageFolder(folder)
