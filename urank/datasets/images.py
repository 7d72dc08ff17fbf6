"""Images in memory and in files, and batches of them.

Images are uint8 until a batch is normalized. A `Split` holds them, so that a data set of small images lies on a device
whole; a `FileSplit` knows their files and reads them when they are asked for.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from urank.distributed import is_first

THREADS = min(16, os.cpu_count() or 1)  # that decode; the libraries that do it release the interpreter
AHEAD = 3  # batches that are being read while one is in use
READ_AT_ONCE = 256  # images, when all of a split are read
Rows = Tensor | slice  # which images: their indices, or from where to where


@dataclass(frozen=True)
class Split:
    """uint8 images (n, 3, h, w) and int64 labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: Rows) -> "Split":
        return Split(self.images[part], self.labels[part])

    def take(self, count: int | None) -> "Split":
        """The first `count` images (all of them for None)."""
        return self[:count]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, h, w)"""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """To which batches go."""
        return self.images.device

    def to(self, device: torch.device | str) -> "Split":
        """The images in the memory of `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def feed(self, device: torch.device | str) -> "Split":
        """What `fit` takes its batches from: as `to`, where the images are small enough to be held."""
        return self.to(device)

    def batches(self, rows: Iterable[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (images, labels) for each of `rows`."""
        for chosen in rows:
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class View:
    """What a network sees of an image file: the middle square of `size` pixels once the shorter side has `resize`."""

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"

    def __post_init__(self):
        if not 0 < self.size <= self.resize:
            raise ValueError(f"the size of an image ({self.size}) is at least 1 and at most resize ({self.resize})")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is 'bilinear' or 'bicubic', not {self.interpolation!r}")

    def read(self, path: str) -> Tensor:
        """uint8 (3, size, size).

        Raises:
            ValueError: the file is no image, or is cut off.
        """
        try:
            whole = pil_loader(path)
        except (OSError, SyntaxError) as error:  # Pillow's for what it cannot decode
            raise ValueError(f"{path}: not a readable image ({error}); copy it again") from error
        resized = transforms.resize(whole, [self.resize], transforms.InterpolationMode(self.interpolation))
        return transforms.pil_to_tensor(transforms.center_crop(resized, [self.size]))


@dataclass(frozen=True)
class FileSplit:
    """Image files and int64 labels (n,), read and decoded by several threads; the interface is that of `Split`."""

    paths: np.ndarray  # of str
    labels: Tensor
    view: View
    device: torch.device = torch.device("cpu")  # to which batches go

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: Rows) -> "FileSplit":
        return replace(self, paths=self.paths[part], labels=self.labels[part])

    def take(self, count: int | None) -> "FileSplit":
        return self[:count]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return 3, self.view.size, self.view.size

    def to(self, device: torch.device | str) -> Split:
        """All images, decoded, in the memory of `device`: 150 KB each at 224 pixels."""
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8, device=device)
        rows = consecutive(even_sizes(len(self), READ_AT_ONCE))
        bar = tqdm(self.feed(device).batches(rows), "reading images", len(rows), leave=False, disable=not is_first())
        for chosen, (some, _) in zip(rows, bar):
            images[chosen] = some
        return Split(images, self.labels.to(device))

    def feed(self, device: torch.device | str) -> "FileSplit":
        """What `fit` takes its batches from: decoded anew each time."""
        return replace(self, device=torch.device(device))

    def batches(self, rows: Iterable[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = rows.cpu() if isinstance(rows, Tensor) else rows  # at once: each batch's would wait for the GPU
        with ThreadPoolExecutor(THREADS) as readers:
            pending: deque[tuple[slice | np.ndarray, list[Future]]] = deque()
            for chosen in rows:
                chosen = chosen if isinstance(chosen, slice) else chosen.numpy()
                pending.append((chosen, [readers.submit(self.view.read, path) for path in self.paths[chosen]]))
                if len(pending) > AHEAD:
                    yield self._collected(*pending.popleft())
            while pending:
                yield self._collected(*pending.popleft())

    def _collected(self, chosen: slice | np.ndarray, images: list[Future]) -> tuple[Tensor, Tensor]:
        decoded = torch.stack([image.result() for image in images])
        return decoded.to(self.device), self.labels[chosen].to(self.device)


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one data set, with the per-channel mean and spread of its pixels.

    `mean` and `std` are in units of the full pixel range (0 to 1).
    """

    name: str
    classes: int
    train: Split | FileSplit
    test: Split | FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, h, w)"""
        return self.test.image_shape

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, h, w) as float32 with zero mean and unit spread a channel over the training set."""
        mean, std = on_device(self.mean, images.device), on_device(self.std, images.device)
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, split: Split | FileSplit, batch_size: int = 256) -> "Batches":
        """Normalized (images, labels) batches of `split` in their stored order."""
        return Batches(self, split, even_sizes(len(split), batch_size))


def even_sizes(total: int, batch_size: int) -> tuple[int, ...]:
    """Sizes of batches of `total` images: all of `batch_size`, the last one of what is left."""
    return tuple(min(batch_size, total - start) for start in range(0, total, batch_size))


def consecutive(sizes: Sequence[int]) -> list[slice]:
    """From where to where batches of these sizes go."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]


@cache
def on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel, as (c, 1, 1); kept, as copying it for every batch would make a GPU wait."""
    return torch.tensor(channels, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Batches:
    """A re-iterable of normalized (images, labels) batches.

    Attributes:
        sizes: number of images in each batch.
        rows: which images of the split, in which order, as indices (n,); None for all as they are stored.
    """

    dataset: Dataset
    split: Split | FileSplit
    sizes: tuple[int, ...]
    rows: Tensor | None = None

    @property
    def total(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> Tensor:
        """(n,), in the order of the batches."""
        return self.split.labels if self.rows is None else self.split.labels[self.rows]

    @property
    def nbytes(self) -> int:
        """Of all images, normalized."""
        return 4 * self.total * math.prod(self.dataset.image_shape)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = consecutive(self.sizes) if self.rows is None else self.rows.split(self.sizes)
        for images, labels in self.split.batches(rows):
            yield self.dataset.normalize(images), labels

    def in_order(self, order: Tensor, sizes: Sequence[int]) -> "Batches":
        """The same images, none copied, in the order of the indices `order` (n,), in batches of these sizes."""
        order = order.to(self.split.labels.device)
        return replace(self, rows=order if self.rows is None else self.rows[order], sizes=tuple(sizes))


def from_arrays(name: str, classes: int, x_train, y_train, x_test, y_test) -> Dataset:
    """A data set from uint8 arrays in the Keras layout: images (n, h, w, 3), labels (n,) or (n, 1)."""
    train, test = split_from_arrays(x_train, y_train), split_from_arrays(x_test, y_test)
    return Dataset(name, classes, train, test, *channel_statistics(train.images))


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


def data_folder() -> Path:
    """Return the folder of the data sets: the environment variable URANK_DATA if set, else `data`."""
    return Path(os.environ.get("URANK_DATA") or "data").expanduser()
