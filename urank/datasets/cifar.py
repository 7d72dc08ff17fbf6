"""CIFAR-10 and CIFAR-100 from files, which are downloaded if they are missing."""

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
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # in an .npz file in the Keras layout; arguments of `from_arrays`


def read_cifar(name: str, folder: Path | str | None = None) -> Dataset:
    """Return CIFAR-10 or CIFAR-100 (fine labels); download it if it is not in the folder.

    The first of these that exists is read, here for CIFAR-10: `cifar10.npz`, torchvision's `cifar-10-batches-py/`, and
    torchvision's archive. The .npz file has the Keras layout: x_train (n, 32, 32, 3) uint8, y_train (n, 1), x_test,
    y_test. It may contain a subset of the images.

    Args:
        name: "cifar10" or "cifar100".
        folder: folder of the files; default: `data_folder()`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ConnectionError: the files are missing and cannot be downloaded; no partial files remain.
        ValueError: a file is damaged or has other content.
    """
    folder = data_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; create it, or set URANK_DATA to the folder with {name}.npz")
    path = folder / f"{name}.npz"
    if path.exists():
        arrays = read_npz(path)
    else:
        path, arrays = read_torchvision(name, folder)
    check_part(f"{path}, training part", CLASSES[name], *arrays[:2])
    check_part(f"{path}, test part", CLASSES[name], *arrays[2:])
    return from_arrays(name, CLASSES[name], *arrays)


def read_npz(path: Path) -> list[np.ndarray]:
    """Return x_train, y_train, x_test and y_test of an .npz file.

    Raises:
        ValueError: the file is damaged or an array is missing.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                missing = [key for key in ARRAYS if key not in stored]
                arrays = [stored[key] for key in ARRAYS if key in stored]
        except Exception as error:  # numpy raises many types for a damaged file; the message names the type
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a readable .npz file ({reason}); delete it and copy it again") from error
    if missing:
        raise ValueError(f"{path}: no array {', '.join(missing)}; the file must contain {', '.join(ARRAYS)}")
    return arrays


def read_torchvision(name: str, folder: Path) -> tuple[Path, list[np.ndarray]]:
    """Return the path and the arrays of torchvision's files in `folder`; download them if they are missing."""
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    place = folder / source.base_folder
    if not place.exists():
        fetch_torchvision(name, folder, source)
    try:
        train, test = source(folder, train=True), source(folder, train=False)
    except RuntimeError as error:
        raise ValueError(f"{place}: incomplete or wrong checksum; delete it to download it again") from error
    return place, [train.data, np.array(train.targets), test.data, np.array(test.targets)]


def fetch_torchvision(name: str, folder: Path, source: type[CIFAR10]) -> None:
    """Download and extract torchvision's files into `folder`, completely or not at all.

    An archive that is already in `folder` is used instead of a download. torchvision verifies the checksum.

    Args:
        source: CIFAR10 or CIFAR100.
    """
    with tempfile.TemporaryDirectory(prefix=f".{source.base_folder}.", dir=folder) as temporary:
        link_archive(folder / source.filename, Path(temporary), source.tgz_md5)
        try:
            source(temporary, download=True)
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            raise ConnectionError(
                f"{folder}: contains neither {name}.npz nor {source.base_folder}/, and {source.url} could not be "
                f"downloaded ({error}); add one of them, or set URANK_DATA to the folder that contains it"
            ) from error
        if not (folder / source.base_folder).exists():  # another process may have created it meanwhile
            os.replace(Path(temporary, source.base_folder), folder / source.base_folder)


def link_archive(archive: Path, folder: Path, md5: str) -> None:
    """Link an existing archive into `folder`, where torchvision looks for it.

    Raises:
        ValueError: the checksum is wrong; torchvision would follow the link and overwrite the user's file.
    """
    if not archive.exists():
        return
    if not check_integrity(archive, md5):
        raise ValueError(f"{archive}: damaged (wrong checksum); delete it to download it again")
    os.symlink(archive.resolve(), folder / archive.name)


def check_part(where: str, classes: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError unless the arrays are 32 x 32 images and labels of all classes; `where` is in the message."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"{where}: images must be uint8 (n, 32, 32, 3), got {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape not in [(len(images),), (len(images), 1)]:
        raise ValueError(
            f"{where}: labels must be integers ({len(images)},) or ({len(images)}, 1), one per image, "
            f"got {labels.dtype} {labels.shape}"
        )
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(classes)):
        span = f"{found[0]} to {found[-1]}" if len(found) else "none"
        raise ValueError(
            f"{where}: labels must include all of 0 to {classes - 1}, found {len(found)} different ones ({span})"
        )
