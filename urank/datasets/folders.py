"""Image files in folders, for a network that somebody wants to measure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from urank.datasets.images import FileSplit, View


def image_files(folder: Path) -> list[Path]:
    """Return the image files directly in `folder`, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, sorted by name.

    Raises:
        FileNotFoundError: `folder` does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --images must name a folder of images")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def labelled_files(folder: Path, classes: int) -> tuple[list[Path], list[int]]:
    """Return the images in one folder per class, and their class numbers.

    The name of a folder is a class number, an ImageNet synset such as n01440764, or any other name if there is one
    folder for each class of the network; then the classes are numbered in the order of the names. A subset of the
    classes is enough for numbers and synsets.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: the name of a folder is not a class of the network.
    """
    files, labels = [], []
    folders = class_folders(folder)
    for part, label in zip(folders, class_numbers([part.name for part in folders], classes, folder)):
        found = image_files(part)
        files += found
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(
            f"{folder}: no images; expected one folder per class, or --agreement for images without labels"
        )
    return files, labels


def class_numbers(names: Sequence[str], classes: int, where: Path) -> list[int]:
    """Return the class number for each folder name (see `labelled_files`)."""
    synsets = {synset: number for number, synset in enumerate(ImageNetInfo().label_names())} if classes == 1000 else {}
    known = {str(number): number for number in range(classes)} | synsets
    if all(name in known for name in names):
        return [known[name] for name in names]
    if len(names) == classes:
        return list(range(classes))
    unknown = next(name for name in names if name not in known)
    raise ValueError(
        f"{where / unknown}: {unknown!r} is not a class of this network ({classes} classes, {len(names)} folders); "
        "name folders by class number or ImageNet synset, or give one folder per class"
    )


def unlabelled_files(folder: Path) -> list[Path]:
    """Return the images in `folder` and in the folders in it.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    files = [file for part in [folder, *class_folders(folder)] for file in image_files(part)]
    if not files:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)})")
    return files


def readable(files: Sequence[Path], view: View) -> list[bool]:
    """Return for each file whether it can be decoded."""
    marks = []
    for file in tqdm(files, "checking images", leave=False):
        try:
            view.read(str(file))
        except ValueError:
            marks.append(False)
        else:
            marks.append(True)
    return marks


def shuffled_split(files: Sequence[Path | str], labels: Sequence[int] | None, view: View) -> FileSplit:
    """Return the images in one fixed random order, with labels of 0 if there are none."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    paths = np.array([str(file) for file in files], dtype=object)
    numbers: Tensor = torch.zeros(len(files), dtype=torch.long) if labels is None else torch.tensor(labels)
    return FileSplit(paths[order], numbers[order], view)
