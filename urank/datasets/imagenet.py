"""ImageNet-1k from a folder that has a folder of images for each class, in train/ and in val/."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from urank.datasets.images import Dataset, FileSplit, View, data_folder

CLASSES = {"imagenet-1k": 1000}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as published networks take them


def read_imagenet(
    name: str,
    folder: Path | str | None = None,
    size: int = 224,
    resize: int = 256,
    interpolation: str = "bilinear",
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Dataset:
    """ImageNet-1k from `folder`/train and `folder`/val; its validation images are what is called `test` here.

    In each, a folder a class, named by its WordNet id: published networks number the classes in the order of these.

    The images of each part come in one random order, always the same, so that a part taken from the front is a fair
    sample. Nothing is read before it is asked for. `models.preprocessing` gives the options that published weights
    were trained for.

    Args:
        folder: `data_folder()`/imagenet for None.
        size, resize, interpolation: see `View`.
        mean, std: of each channel, in units of the full pixel range.

    Raises:
        FileNotFoundError: there is no such folder, or a class has no images.
        ValueError: it has other classes than a thousand, or other ones in train/ and in val/.
    """
    folder = data_folder() / "imagenet" if folder is None else Path(folder)
    parts = [image_folder(folder / part) for part in ("train", "val")]
    classes, needed = parts[0].classes, CLASSES[name]
    if not len(classes) == needed == len(set(classes) & set(parts[1].classes)) == len(parts[1].classes):
        raise ValueError(
            f"{folder}: needs the same {needed} folders, one a class, in train/ and val/; they have {len(classes)} and "
            f"{len(parts[1].classes)}"
        )
    train, test = (shuffled(part, View(size, resize, interpolation)) for part in parts)
    return Dataset(name, needed, train, test, tuple(mean), tuple(std))


def image_folder(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; put ImageNet's images there, a folder a class, or set URANK_DATA to the folder "
            f"that has imagenet/train and imagenet/val"
        )
    return ImageFolder(folder)


def shuffled(images: ImageFolder, view: View) -> FileSplit:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    paths = np.array([path for path, _ in images.samples], dtype=object)
    return FileSplit(paths[order], torch.tensor(images.targets)[order], view)
