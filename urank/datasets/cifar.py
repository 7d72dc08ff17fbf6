"""CIFAR-10 and CIFAR-100 from a folder, downloaded into it when missing."""

import os
import tempfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from urank.datasets.images import Dataset, data_folder, from_arrays

CLASSES = {"cifar10": 10, "cifar100": 100}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # of an .npz file in the Keras layout, in `from_arrays`' order


def read_cifar(name: str, folder: Path | str | None = None) -> Dataset:
    """CIFAR-10 or CIFAR-100 (fine labels) from `folder`; downloaded into it when missing.

    Read is what comes first: `cifar10.npz` (Keras layout: x_train (n, 32, 32, 3) uint8, y_train (n, 1), x_test,
    y_test; n may be a part of the whole), torchvision's `cifar-10-batches-py/`, or its archive. CIFAR-100 likewise.

    Args:
        folder: `data_folder()` for None.

    Raises:
        FileNotFoundError: there is no such folder.
        ConnectionError: the files are missing and cannot be downloaded; nothing is left behind.
        ValueError: a file is damaged or holds something else.
    """
    folder = data_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; create it or set URANK_DATA to the one that has {name}.npz")
    path = folder / f"{name}.npz"
    if path.exists():
        arrays = read_npz(path)
    else:
        path, arrays = read_torchvision(name, folder)
    check_part(f"{path}, training part", CLASSES[name], *arrays[:2])
    check_part(f"{path}, test part", CLASSES[name], *arrays[2:])
    return from_arrays(name, CLASSES[name], *arrays)


def read_npz(path: Path) -> list[np.ndarray]:
    """x_train, y_train, x_test and y_test of an .npz file.

    Raises:
        ValueError: the file is damaged or lacks one of them; the message names it.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                missing = [key for key in ARRAYS if key not in stored]
                arrays = [stored[key] for key in ARRAYS if key in stored]
        except Exception as error:  # numpy raises nearly ten types for a damaged file; each is re-raised with its name
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a readable .npz file ({reason}); delete it and copy it again") from error
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}; an .npz file needs {', '.join(ARRAYS)}")
    return arrays


def read_torchvision(name: str, folder: Path) -> tuple[Path, list[np.ndarray]]:
    """The place and the arrays of torchvision's own files in `folder`, which are fetched when missing."""
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    place = folder / source.base_folder
    if not place.exists():
        fetch_torchvision(name, folder, source)
    try:
        train, test = source(folder, train=True), source(folder, train=False)
    except RuntimeError as error:
        raise ValueError(f"{place}: incomplete or with a wrong checksum; delete it to download it again") from error
    return place, [train.data, np.array(train.targets), test.data, np.array(test.targets)]


def fetch_torchvision(name: str, folder: Path, source: type) -> None:
    """Put torchvision's files of `source` (CIFAR10 or CIFAR100) in `folder`, whole or not at all.

    The archive is downloaded unless it lies in `folder`; torchvision checks its checksum.
    """
    with tempfile.TemporaryDirectory(prefix=f".{source.base_folder}.", dir=folder) as temporary:
        link_archive(folder / source.filename, Path(temporary), source.tgz_md5)
        try:
            source(temporary, download=True)
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            raise ConnectionError(
                f"{folder}: holds neither {name}.npz nor {source.base_folder}/, and {source.url} could not be "
                f"downloaded ({error}); put one of them there or set URANK_DATA to the folder that has it"
            ) from error
        if not (folder / source.base_folder).exists():  # another process may have been faster
            os.replace(Path(temporary, source.base_folder), folder / source.base_folder)


def link_archive(archive: Path, folder: Path, md5: str) -> None:
    """Let torchvision find `archive`, if there is one, in `folder`.

    Raises:
        ValueError: wrong checksum; torchvision would follow the link and write its download over the user's file.
    """
    if not archive.exists():
        return
    if not check_integrity(archive, md5):
        raise ValueError(f"{archive}: cut off or damaged (wrong checksum); delete it to download it again")
    os.symlink(archive.resolve(), folder / archive.name)


def check_part(where: str, classes: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError, naming `where`, unless images and labels are those of a data set of `classes` classes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"{where}: images must be uint8 (n, 32, 32, 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape not in [(len(images),), (len(images), 1)]:
        raise ValueError(
            f"{where}: labels must be integers ({len(images)},) or ({len(images)}, 1), one an image, "
            f"not {labels.dtype} {labels.shape}"
        )
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(classes)):
        span = f"{found[0]} to {found[-1]}" if len(found) else "none"
        raise ValueError(f"{where}: needs all labels 0 to {classes - 1}, has {len(found)} different ones ({span})")
