"""Data sets of images in memory or in files, and batches of normalized images.

Images are uint8 until a batch is normalized. A `Split` keeps all images in memory, on the CPU or a GPU. A `FileSplit`
reads image files when a batch is requested.
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

READER_THREADS = min(16, os.cpu_count() or 1)  # decoding releases the interpreter lock
PREFETCHED_BATCHES = 3  # batches that are read in advance
READ_BATCH_SIZE = 256  # images per batch when a whole split is read into memory
Rows = Tensor | slice  # the images of a batch: indices, or a range


@dataclass(frozen=True)
class Split:
    """uint8 images (n, 3, h, w) and int64 labels (n,) in memory.

    >>> split = Split(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10))
    >>> len(split.take(4)), split.image_shape
    (4, (3, 32, 32))
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: Rows) -> "Split":
        return Split(self.images[part], self.labels[part])

    def take(self, count: int | None) -> "Split":
        """Return the first `count` images (None: all)."""
        return self[:count]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (3, h, w)."""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.images.device

    def to(self, device: torch.device | str) -> "Split":
        """Copy the images to the memory of `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def feed(self, device: torch.device | str) -> "Split":
        """Return a split whose batches are on `device`; here all images are copied there."""
        return self.to(device)

    def batches(self, rows: Iterable[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 (images, labels) for each element of `rows`."""
        for chosen in rows:
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class View:
    """Preprocessing of an image file: resize it, then crop the centre.

    Attributes:
        size: side of the square crop, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        interpolation: "bilinear" or "bicubic".
        squash: resize both sides to `resize`, which changes the aspect ratio.
    """

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size must be between 1 and resize ({self.resize}), got {self.size}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")

    def read(self, path: str) -> Tensor:
        """Read an image as uint8 (3, size, size).

        Raises:
            ValueError: the file is not an image or is truncated.
        """
        try:
            whole = pil_loader(path)
        except (OSError, SyntaxError) as error:  # Pillow raises these if it cannot decode a file
            raise ValueError(f"{path}: not a readable image ({error}); copy it again") from error
        sides = [self.resize] * (2 if self.squash else 1)
        resized = transforms.resize(whole, sides, transforms.InterpolationMode(self.interpolation))
        return transforms.pil_to_tensor(transforms.center_crop(resized, [self.size]))


@dataclass(frozen=True)
class FileSplit:
    """Image files and int64 labels (n,), with the interface of `Split`; several threads read and decode the files.

    Attributes:
        paths: file names (n,), an object array of str.
        device: device of the batches.
    """

    paths: np.ndarray
    labels: Tensor
    view: View
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: Rows) -> "FileSplit":
        return replace(self, paths=self.paths[part], labels=self.labels[part])

    def take(self, count: int | None) -> "FileSplit":
        """Return the first `count` images (None: all)."""
        return self[:count]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (3, h, w)."""
        return 3, self.view.size, self.view.size

    def to(self, device: torch.device | str) -> Split:
        """Read all images into the memory of `device`: 150 KB per image of 224 pixels."""
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8, device=device)
        rows = consecutive(even_sizes(len(self), READ_BATCH_SIZE))
        bar = tqdm(self.feed(device).batches(rows), "reading images", len(rows), leave=False, disable=not is_first())
        for chosen, (some, _) in zip(rows, bar):
            images[chosen] = some
        return Split(images, self.labels.to(device))

    def feed(self, device: torch.device | str) -> "FileSplit":
        """Return a split whose batches are on `device`; the files are read again for every pass."""
        return replace(self, device=torch.device(device))

    def batches(self, rows: Iterable[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 (images, labels) for each element of `rows`; the next batches are read in advance."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows  # one copy: a copy per batch would wait for the GPU
        with ThreadPoolExecutor(READER_THREADS) as readers:
            pending: deque[tuple[slice | np.ndarray, list[Future]]] = deque()
            for batch in rows:
                chosen = batch if isinstance(batch, slice) else batch.numpy()
                pending.append((chosen, [readers.submit(self.view.read, path) for path in self.paths[chosen]]))
                if len(pending) > PREFETCHED_BATCHES:
                    yield self._collected(*pending.popleft())
            while pending:
                yield self._collected(*pending.popleft())

    def _collected(self, chosen: slice | np.ndarray, images: list[Future]) -> tuple[Tensor, Tensor]:
        decoded = torch.stack([image.result() for image in images])
        return decoded.to(self.device), self.labels[chosen].to(self.device)


@dataclass(frozen=True)
class Dataset:
    """Training and test images, with the statistics that normalize them.

    Attributes:
        classes: number of classes.
        mean, std: mean and standard deviation of the training pixels per channel, where 1 is the full pixel range.
    """

    name: str
    classes: int
    train: Split | FileSplit
    test: Split | FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (3, h, w)."""
        return self.test.image_shape

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 images (n, 3, h, w) to float32: (pixel - mean) / std per channel, channels last."""
        mean, std = on_device(self.mean, images.device), on_device(self.std, images.device)
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, split: Split | FileSplit, batch_size: int = 256) -> "Batches":
        """Return normalized batches (images, labels) of `split` in the stored order."""
        return Batches(self, split, even_sizes(len(split), batch_size))


def even_sizes(total: int, batch_size: int) -> tuple[int, ...]:
    """Return batch sizes for `total` images: `batch_size`, and the remainder for the last batch.

    >>> even_sizes(10, 4)
    (4, 4, 2)
    """
    return tuple(min(batch_size, total - start) for start in range(0, total, batch_size))


def consecutive(sizes: Sequence[int]) -> list[slice]:
    """Return the ranges of consecutive batches.

    >>> consecutive([4, 2])
    [slice(0, 4, None), slice(4, 6, None)]
    """
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]


@cache
def on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel as a tensor (c, 1, 1) on the device; cached, because a copy makes a GPU wait."""
    return torch.tensor(channels, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Batches:
    """Normalized batches (images, labels); can be iterated several times.

    Attributes:
        sizes: number of images per batch.
        rows: indices (n,) of the images in the split, in order; None for all images in the stored order.
    """

    dataset: Dataset
    split: Split | FileSplit
    sizes: tuple[int, ...]
    rows: Tensor | None = None

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def labels(self) -> Tensor:
        """Labels (n,) in the order of the batches."""
        return self.split.labels if self.rows is None else self.split.labels[self.rows]

    @property
    def nbytes(self) -> int:
        """Memory of all normalized images, in bytes."""
        return 4 * self.total * math.prod(self.dataset.image_shape)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = consecutive(self.sizes) if self.rows is None else self.rows.split(self.sizes)
        for images, labels in self.split.batches(rows):
            yield self.dataset.normalize(images), labels

    def in_order(self, order: Tensor, sizes: Sequence[int]) -> "Batches":
        """Return batches of the same images in the order of the indices `order` (n,), without copying images."""
        order = order.to(self.split.labels.device)
        return replace(self, rows=order if self.rows is None else self.rows[order], sizes=tuple(sizes))

    def to(self, device: torch.device | str) -> "Batches":
        """Return the batches on `device`: images in memory are copied there, files are read when they are needed."""
        split = self.split.feed(device)
        return replace(self, split=split, rows=self.rows if self.rows is None else self.rows.to(split.labels.device))


def from_arrays(
    name: str, classes: int, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Dataset:
    """Return a data set from arrays in the Keras layout: uint8 images (n, h, w, 3), labels (n,) or (n, 1)."""
    train, test = split_from_arrays(x_train, y_train), split_from_arrays(x_test, y_test)
    return Dataset(name, classes, train, test, *channel_statistics(train.images))


def split_from_arrays(images: np.ndarray, labels: np.ndarray) -> Split:
    """Return a split from uint8 images (n, h, w, 3) and labels (n,) or (n, 1)."""
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Split(torch.from_numpy(channels_first), torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images (n, c, h, w), where 1 is the full pixel range."""
    # Computed from the histogram of the 256 levels: exact, and without a float64 copy of the images (1.2 GB for CIFAR).
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    shares = shares.double() / (images.numel() / images.shape[1])  # (c, 256)
    mean = shares @ levels
    variance = (shares * (levels - mean.unsqueeze(1)) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def data_folder() -> Path:
    """Return the folder of the data sets: the environment variable URANK_DATA, or `data` if it is not set."""
    return Path(os.environ.get("URANK_DATA") or "data").expanduser()
