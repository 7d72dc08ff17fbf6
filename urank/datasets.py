"""Images by name: digits that ship inside scikit-learn, and CIFAR from a folder.

Every data set is held as uint8 images (n, 3, h, w) with integer labels, so that it fits on a device whole; `Batches`
turns it into normalized floating-point batches, the same ones each time it is iterated.

`load("digits10")` and `load("digits100")` draw small scenes around scikit-learn's handwritten digits and need no file;
`load("cifar10")` and `load("cifar100")` read the folder `data_folder()`.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = {"digits10": 10, "digits100": 100, "cifar10": 10, "cifar100": 100}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # of an .npz file in the Keras layout, in `from_arrays`' order
SIDE = 32  # height and width of every image, in pixels


def load(name: str, **options) -> "Dataset":
    """The data set called `name`: "digits10", "digits100", "cifar10" or "cifar100".

    >>> dataset = load("digits100", train=10_000, seed=1)
    >>> for images, labels in dataset.batches(dataset.test): ...

    Args:
        options: of `draw_digits` (train, test, seed, plain) or of `read_cifar` (folder).

    Raises:
        ValueError: another name, an option that the data set does not have, or files with bad content.
        FileNotFoundError, ConnectionError: see `read_cifar`.
    """
    if name not in CLASSES:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(CLASSES)}")
    check_options(name, options)
    return reader(name)(name, **options)


def reader(name: str) -> Callable[..., "Dataset"]:
    return draw_digits if name.startswith("digits") else read_cifar


def check_options(name: str, options: dict) -> None:
    unknown = options.keys() - inspect.signature(reader(name)).parameters
    if unknown:
        raise ValueError(f"{name}: no such option: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Split:
    """uint8 images (n, 3, h, w) and int64 labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int | None) -> "Split":
        """The first `count` images (all of them for None)."""
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one data set, with the per-channel mean and spread of the training pixels.

    `mean` and `std` are in units of the full pixel range (0 to 1).
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, h, w) as float32 with zero mean and unit spread a channel over the training set."""
        mean, std = on_device(self.mean, images.device), on_device(self.std, images.device)
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, split: Split, batch_size: int = 256) -> "Batches":
        """Normalized (images, labels) batches of `split` in their stored order."""
        return Batches(self, split, batch_size)


@cache
def on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel, as (c, 1, 1); kept, as copying it for every batch would make a GPU wait."""
    return torch.tensor(channels, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Batches:
    """A re-iterable of normalized (images, labels) batches."""

    dataset: Dataset
    split: Split
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.split.images.split(self.batch_size), self.split.labels.split(self.batch_size)):
            yield self.dataset.normalize(images), labels


def from_arrays(name: str, x_train, y_train, x_test, y_test) -> Dataset:
    """A data set from uint8 arrays in the Keras layout: images (n, h, w, 3), labels (n,) or (n, 1)."""
    train, test = split_from_arrays(x_train, y_train), split_from_arrays(x_test, y_test)
    return Dataset(name, CLASSES[name], train, test, *channel_statistics(train.images))


def split_from_arrays(images: np.ndarray, labels: np.ndarray) -> Split:
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Split(images, torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread of each channel of uint8 images (n, c, h, w), in units of the full pixel range."""
    # From how often each of the 256 levels occurs: exact, and without CIFAR's pixels as 1.2 GB of float64.
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    shares = shares.double() / (images.numel() / images.shape[1])  # (c, 256)
    mean = shares @ levels
    variance = (shares * (levels - mean.unsqueeze(1)) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


# --- digits: drawn on the fly ----------------------------------------------------------------------------------------

CHUNK = 1000  # images drawn at a time, which bounds the memory


def draw_digits(name: str, train: int = 6000, test: int = 2000, seed: int = 0, plain: bool = False) -> Dataset:
    """Handwritten digits (scikit-learn's, 8 x 8) in random places, sizes and colours on 32 x 32 scenes.

    "digits10" shows one digit. "digits100" shows two, tens on the left and units on the right, so the same pixels make
    a harder data set. No handwritten digit is seen both in training and in test images, whatever the seeds. Every
    `classes` consecutive images hold each class once, so that a part taken from the front stays balanced. A mirrored
    digit is no digit: train with `Recipe(flip=False)`.

    Args:
        train, test: numbers of images, at least one a class.
        seed: of the drawing; the training images do not depend on `test`, nor the test images on `train`.
        plain: white digits on black, each in its place and of one size, as a scanner would leave them: for networks
            that take more images to learn what colour and place do not mean, such as transformers.

    Raises:
        ValueError: fewer images than classes.
    """
    from sklearn.datasets import load_digits  # takes a second, which only those who draw digits wait for

    classes = CLASSES[name]
    if min(train, test) < classes:
        raise ValueError(f"{name}: {train} training and {test} test images cannot show each of {classes} classes")
    sources, draw = load_digits(), draw_plain if plain else draw_scenes
    glyphs, digits = torch.from_numpy(sources.images).float() / 16, torch.from_numpy(sources.target)
    arrays = []
    for part, (pool, count) in enumerate(zip(split_sources(digits), (train, test))):
        state = np.random.SeedSequence([seed, classes, part]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        labels = balanced_labels(classes, count, generator)
        images = torch.cat([draw(some, classes, glyphs, digits, pool, generator) for some in labels.split(CHUNK)])
        arrays += [images.numpy(), labels.numpy()]
    return from_arrays(name, *arrays)


def split_sources(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the handwritten digits that training and test images may show: 3/4 and 1/4 of each class.

    The split is the same for every seed and data set, so that a network trained on one can be tested on another.
    """
    from sklearn.model_selection import train_test_split

    indices = torch.arange(len(digits))
    train, test = train_test_split(indices.numpy(), test_size=0.25, stratify=digits.numpy(), random_state=0)
    return indices[train], indices[test]


def balanced_labels(classes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` labels (int64): one random order of all classes after another."""
    rounds = -(-count // classes)
    return torch.rand(rounds, classes, generator=generator).argsort(1).flatten()[:count]


def draw_scenes(
    labels: Tensor, classes: int, glyphs: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Images (n, 32, 32, 3), uint8, of `labels` (n,), drawn with the handwritten digits whose index is in `pool`.

    Args:
        glyphs, digits: all handwritten digits, (s, 8, 8) with ink from 0 to 1, and what they are, (s,).
    """
    canvas, lightness = draw_backgrounds(len(labels), generator)
    for shown, (left, right), (smallest, largest) in layout(labels, classes):
        chosen = choose_sources(shown, digits, pool, generator)
        size = uniform(len(labels), smallest, largest, generator)
        ink = draw_ink(glyphs[chosen], uniform(len(labels), left, right, generator), size, generator)
        canvas = torch.lerp(canvas, contrasting_colour(lightness, generator), ink)
    canvas = canvas + 0.03 * torch.randn(canvas.shape, generator=generator)
    return (255 * canvas.clamp(0, 1)).round().byte().permute(0, 2, 3, 1)


def draw_plain(
    labels: Tensor, classes: int, glyphs: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """As `draw_scenes`, white on black, each digit in the middle of the places and sizes that it may have there."""
    canvas = torch.zeros(len(labels), 1, SIDE, SIDE)
    for shown, (left, right), (smallest, largest) in layout(labels, classes):
        chosen = glyphs[choose_sources(shown, digits, pool, generator)]
        size, x = int((smallest + largest) / 2), (left + right) / 2
        fine = F.interpolate(chosen.unsqueeze(1), (size, size), mode="bilinear")
        top, start = (SIDE - size) // 2, max(0, round(x - size / 2))
        place = canvas[..., top : top + size, start : start + size]
        place.copy_(torch.maximum(place, fine[..., : place.shape[3]]))
    return (255 * canvas).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def layout(labels: Tensor, classes: int) -> list[tuple[Tensor, tuple[float, float], tuple[float, float]]]:
    """For each digit of a scene: which it is (n,), the range of its centre's x and that of its size, in pixels."""
    if classes == 10:
        return [(labels, (12, 20), (20, 30))]
    return [(labels // 10, (7.5, 10), (17, 23)), (labels % 10, (22, 24.5), (17, 23))]


def choose_sources(shown: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    """For each digit of `shown` (n,), the index (n,) of a handwritten one from `pool`, at random."""
    ordered = pool[digits[pool].argsort(stable=True)]
    counts = digits[pool].bincount(minlength=10)
    nth = (torch.rand(len(shown), generator=generator) * counts[shown]).long()
    return ordered[(counts.cumsum(0) - counts)[shown] + nth]


def draw_ink(glyphs: Tensor, x: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """How much ink (n, 1, 32, 32), 0 to 1, glyphs (n, 8, 8) leave when drawn at x with a side of `size` pixels."""
    n = len(glyphs)
    angle, slant = uniform(n, -0.2, 0.2, generator), uniform(n, -0.2, 0.2, generator)
    y = SIDE / 2 + (SIDE - size) / 2 * uniform(n, -0.9, 0.9, generator)
    # From a pixel of the scene to a place on the glyph, both in -1..1: move the centre to 0, turn, slant, magnify.
    turn = torch.stack([angle.cos(), angle.sin() + slant, -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    zoom = turn * (SIDE / size).view(n, 1, 1)
    shift = -zoom @ (torch.stack([x, y], 1) / (SIDE / 2) - 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([zoom, shift], 2), [n, 1, SIDE, SIDE], align_corners=False)
    fine = F.interpolate(glyphs.unsqueeze(1), (SIDE, SIDE), mode="bicubic")
    soft = F.grid_sample(fine, grid, align_corners=False)
    # 8 x 8 pixels enlarged are a blur: a steep threshold turns it back into a stroke, of varying width.
    return torch.sigmoid(14 * (soft - uniform(n, 0.35, 0.55, generator).view(n, 1, 1, 1)))


def draw_backgrounds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two-coloured clouds (n, 3, 32, 32) and the lightness (n,) around which both colours lie, in 0 to 1."""
    dark = uniform(n, 0.12, 0.38, generator)
    lightness = torch.where(torch.rand(n, generator=generator) < 0.5, dark, 1 - dark)
    one, other = (colour(lightness + uniform(n, -0.1, 0.1, generator), generator) for _ in range(2))
    sharpness = uniform(n, 0, 2, generator).exp2().view(n, 1, 1, 1) * 2
    clouds = torch.sigmoid(sharpness * (noise(n, 4, generator) + 0.5 * noise(n, 11, generator)))
    return torch.lerp(one, other, clouds), lightness


def noise(n: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (n, 1, 32, 32) of about `cells` bumps along each side."""
    coarse = torch.randn(n, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def contrasting_colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Colours (n, 3, 1, 1) well lighter than a dark `lightness` (n,) and well darker than a light one."""
    step = uniform(len(lightness), 0.38, 0.58, generator)
    return colour(torch.where(lightness < 0.5, lightness + step, lightness - step), generator)


def colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Colours (n, 3, 1, 1) of the given lightness (n,) and any hue, in about 0 to 1."""
    tint = torch.rand(len(lightness), 3, generator=generator) * 0.7
    weights = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue in how light a colour looks (Rec. 601)
    return (tint + (lightness - tint @ weights).unsqueeze(1)).view(-1, 3, 1, 1).clamp(0, 1)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


# --- CIFAR: from a folder --------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Where the files are: URANK_DATA if set, else data/ of the repository, else (installed elsewhere) ./data."""
    if os.environ.get("URANK_DATA"):
        return Path(os.environ["URANK_DATA"]).expanduser()
    beside = Path(__file__).resolve().parents[1] / "data"
    return beside if beside.is_dir() else Path("data")


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
    return from_arrays(name, *arrays)


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
    from torchvision.datasets import CIFAR10, CIFAR100  # takes a second, which only those who read CIFAR wait for

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
    from torchvision.datasets.utils import check_integrity

    if not archive.exists():
        return
    if not check_integrity(archive, md5):
        raise ValueError(f"{archive}: cut off or damaged (wrong checksum); delete it to download it again")
    os.symlink(archive.resolve(), folder / archive.name)


def check_part(where: str, classes: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError, naming `where`, unless images and labels are those of a data set of `classes` classes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
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
