"""The validation images of a search, and how many of them a network classifies correctly."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from urank.calibration import images_of
from urank.distributed import processes, share, totals
from urank.layers import evaluating
from urank.plan import COUNTS
from urank.search.replay import ReusableBatches, in_order

MAX_FLOAT_BYTES = 4 << 30  # images that are kept as floats; about 7,000 of 224 x 224 pixels

Judged = tuple[Tensor, Tensor]  # of a batch: margins (n,), and whether each image is correct (n,)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the label's logit minus the largest other logit, (n,): positive if the image is correct, 0 for a tie."""
    of_label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return of_label[:, 0] - others


def judge(logits: Tensor, labels: Tensor) -> Judged:
    """Return margins and which images are correct. Of equal logits, the first class is the prediction."""
    return margins(logits, labels), logits.argmax(1) == labels


class Validation:
    """The validation images and labels of a search.

    Args:
        batches: batches of (images, labels) on the model's device. They are read once and kept in memory as floats. The
            batches of a `Dataset` that would take more than 4 GiB stay bytes or files and are normalized at each pass.
        counts: what the labels are: "labels", or "agreement" (see `Validation.agreement`). The plan repeats it.

    Raises:
        ValueError: there is no image, labels are not integers, or `counts` is unknown.

    Example:
        >>> import torch
        >>> images, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        >>> Validation([(images, labels)]).total
        8
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], counts: str = "labels"):
        if counts not in COUNTS:
            raise ValueError(f"counts must be 'labels' or 'agreement', got {counts!r}")
        reusable = isinstance(batches, HeldBatches) or getattr(batches, "nbytes", 0) > MAX_FLOAT_BYTES
        self.batches = cast(ReusableBatches, batches) if reusable else HeldBatches(batches)
        self.counts, self.total = counts, self.batches.total
        if self.total == 0:
            raise ValueError("the validation set is empty: the search needs images to count correct ones")

    @classmethod
    def agreement(cls, model: nn.Module, batches: Iterable) -> "Validation":
        """Label images with the predictions of `model` itself, for a search without labelled data.

        This is our addition, not the paper's. All images count as correct at first. The accuracy on these images,
        whatever their true labels, falls by no more than the agreement does.

        Args:
            batches: batches of images, or of (images, anything), on the model's device.

        Raises:
            ValueError: there is no image, or the model changes its input in place.
            FloatingPointError: the logits contain NaN or infinity.
        """
        with evaluating(model):
            images = [images for images in map(images_of, batches) if len(images)]
            return cls([(batch, finite(predict(model, batch)).argmax(1)) for batch in images], counts="agreement")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def labels(self) -> list[Tensor]:
        """Return the labels in parts, without loading images that are not kept in memory."""
        labels = getattr(self.batches, "labels", None)
        return [labels for _, labels in self.batches] if labels is None else [labels]

    def count_correct(self, model: nn.Module) -> int:
        """Return how many images `model` classifies correctly in evaluation mode.

        Raises:
            ValueError: a label is not a class of the model, logits are not (n, classes) or labels not (n,), or the
                model changes its input in place.
            FloatingPointError: the logits contain NaN or infinity.
        """
        with evaluating(model):
            right = (checked(predict(model, images), labels).argmax(1) == labels for images, labels in share(self))
            return totals(sum(int(images.sum()) for images in right))[0]

    def hardest_first(self, model: nn.Module) -> tuple["Validation", Tensor, Tensor]:
        """Sort the images by margin, the smallest first, so that a failing probe fails after a few batches.

        Returns:
            The sorted validation set, the margins (n,) in this order, and which images are correct (n,).

        Raises:
            ValueError, FloatingPointError: as `count_correct`.
        """
        with evaluating(model):
            judged = [judge(checked(predict(model, images), labels), labels) for images, labels in self]
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        order = margin.argsort(stable=True)
        return self.in_order(order), margin[order], right[order]

    def shared(self) -> "Validation":
        """Return this process's share of every batch.

        Raises:
            ValueError: there are fewer images than processes.
        """
        count = processes()[1]
        if self.total < count:
            raise ValueError(f"{self.total} validation images cannot be shared among {count} processes")
        if count == 1:
            return self
        rows = self.own(torch.arange(self.total))
        return Validation(self.batches.in_order(torch.cat(rows), [len(part) for part in rows]), self.counts)

    def own(self, values: Tensor) -> list[Tensor]:
        """Select from `values` (n,), one per image, those of this process's share of every batch."""
        number, count = processes()
        return [part[number::count] for part in values.split(self.batches.sizes)]

    def in_order(self, order: Tensor, sizes: Sequence[int] | None = None) -> "Validation":
        """Return the images in the order of the indices `order` (n,), in batches of `sizes`; default growing ones."""
        sizes = sizes or growing_sizes(self.total, max(self.batches.sizes), least=processes()[1])
        return Validation(self.batches.in_order(order, sizes), self.counts)


class HeldBatches:
    """Batches of (images, labels) in memory, without empty ones.

    Attributes:
        sizes: number of images in each batch.
        total: number of images.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]):
        self.batches = [(images, as_classes(labels)) for images, labels in batches if len(labels)]
        self.whole: tuple[Tensor, Tensor] | None = None  # the tensors of which the batches are views, if any
        self.sizes = [len(labels) for _, labels in self.batches]
        self.total = sum(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def in_order(self, order: Tensor, sizes: Sequence[int]) -> "HeldBatches":
        """Return the images in the order of the indices `order` (n,), in batches of these sizes."""
        images, labels = (in_order(parts, order) for parts in zip(*([self.whole] if self.whole else self.batches)))
        held = HeldBatches(zip(images.split(sizes), labels.split(sizes)))
        held.whole = images, labels
        return held


def growing_sizes(total: int, most: int, least: int) -> list[int]:
    """Split `total` images into batches that double in size up to `most`: failures show in the first few images."""
    sizes: list[int] = []
    size = max(1, most // 32, least)
    while sum(sizes) < total:
        sizes.append(min(size, total - sum(sizes)))
        size = max(least, min(2 * size, most))
    if sizes[-1] < least and len(sizes) > 1:  # every process needs an image of every batch
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


def as_classes(labels: Tensor) -> Tensor:
    """Convert integer labels to int64, the type of an index."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers (class numbers), got {labels.dtype}")
    return labels.long()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits; refuse a model that changes its input, because the images are used again in every probe."""
    before = None if images.is_inference() else images._version
    logits = model(images)
    if before is not None and images._version != before:
        raise ValueError("the network changes its input images in place; make its forward work on a copy")
    return logits


def checked(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `logits` if they are finite, (n, classes), and cover the labels (n,)."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (n, classes) and labels (n,), got logits {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the network has {logits.shape[1]} classes"
        )
    return finite(logits)


def finite(logits: Tensor) -> Tensor:
    """Return `logits` if they are all finite."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the network's logits contain NaN or infinity; check its weights and the images")
    return logits


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy of `model` in percent over batches of (images, labels), in the model's own precision.

    >>> evaluate(nn.Identity(), [(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([1, 0]))])
    50.0
    """
    validation = Validation(batches)
    return 100 * validation.count_correct(model) / validation.total
