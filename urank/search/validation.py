"""The images and labels that a search consults, and how correct ones are counted."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from urank.calibration import images_of
from urank.distributed import processes, share, totals
from urank.layers import evaluating
from urank.plan import COUNTS
from urank.search.probes import judge
from urank.search.replay import in_order

HELD = 4 << 30  # bytes of images in floating point; 7,000 of 224 x 224 pixels


class Validation:
    """The images and labels that a search consults, and how correct ones are counted.

    Args:
        batches: a re-iterable of (images, labels); read once and held, as floats. Only a data set's batches that would
            take more than `HELD` bytes stay as they are, bytes or files, and are normalized at each pass.
        counts: what the labels are, for the plan to say: "labels", or "agreement" (see there).

    Raises:
        ValueError: there is no image, labels are no whole numbers, or another `counts`.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], counts: str = "labels"):
        if counts not in COUNTS:
            raise ValueError(f"a validation counts 'labels' or 'agreement', got {counts!r}")
        as_it_is = isinstance(batches, Held) or getattr(batches, "nbytes", 0) > HELD
        self.batches = batches if as_it_is else Held(batches)
        self.counts, self.total = counts, self.batches.total
        if self.total == 0:
            raise ValueError("the validation set is empty: the search needs images to count correct ones")

    @classmethod
    def agreement(cls, model: nn.Module, batches: Iterable) -> "Validation":
        """Images labelled with what `model` itself predicts, for a search in a network without labelled data.

        Ours, not the paper's. All images count as correct at first, and each that is answered otherwise later as lost:
        on these images the accuracy, whatever their labels, falls by no more than the agreement does.

        Args:
            batches: batches of images, or of (images, anything), on the model's device.

        Raises:
            ValueError: there is no image, or the model changes the images that it is given.
            FloatingPointError: the logits hold NaN or infinity.
        """
        with evaluating(model):
            images = [images for images in map(images_of, batches) if len(images)]
            return cls([(batch, finite(answers(model, batch)).argmax(1)) for batch in images], counts="agreement")

    def __iter__(self):
        return iter(self.batches)

    def labels(self) -> list[Tensor]:
        """The labels in parts, without their images where these are not held."""
        labels = getattr(self.batches, "labels", None)
        return [labels for _, labels in self.batches] if labels is None else [labels]

    def count_correct(self, model: nn.Module) -> int:
        """How many images `model` classifies correctly, in evaluation mode.

        Raises:
            ValueError: a label that the model has no output for, logits or labels of another shape than (n, classes)
                and (n,), or a model that changes the images that it is given.
            FloatingPointError: the logits hold NaN or infinity.
        """
        with evaluating(model):
            right = (checked(answers(model, images), labels).argmax(1) == labels for images, labels in share(self))
            return totals(sum(int(images.sum()) for images in right))[0]

    def hardest_first(self, model: nn.Module) -> tuple["Validation", Tensor, Tensor]:
        """The same images in the order of the margin by which `model` gets them right, the smallest first.

        A probe that fails then fails after a few batches. The margin is the label's logit less the largest other.

        Returns:
            These, and in their order the margins (n,) and who is right (n,), as answered in the batches as they are.

        Raises:
            ValueError, FloatingPointError: as `count_correct`.
        """
        with evaluating(model):
            judged = [judge(checked(answers(model, images), labels), labels) for images, labels in self]
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        order = margin.argsort(stable=True)
        return self.in_order(order), margin[order], right[order]

    def shuffled(self) -> "Validation":
        """The same images in a random order, always the same one."""
        return self.in_order(torch.randperm(self.total, generator=torch.Generator().manual_seed(0)))

    def shared(self) -> "Validation":
        """This process's share of every batch.

        Raises:
            ValueError: fewer images than processes.
        """
        count = processes()[1]
        if self.total < count:
            raise ValueError(f"{self.total} validation images cannot be shared among {count} processes")
        if count == 1:
            return self
        rows = self.own(torch.arange(self.total))
        return Validation(self.batches.in_order(torch.cat(rows), [len(part) for part in rows]), self.counts)

    def own(self, values: Tensor) -> list[Tensor]:
        """Of `values` (n,), one an image: those of this process's share of every batch."""
        number, count = processes()
        return [part[number::count] for part in values.split(self.batches.sizes)]

    def in_order(self, order: Tensor, sizes: Sequence[int] | None = None) -> "Validation":
        """The same images in the order of the indices `order` (n,), in batches of `sizes`; by default growing ones."""
        sizes = sizes or growing_sizes(self.total, max(self.batches.sizes), least=processes()[1])
        return Validation(self.batches.in_order(order, sizes), self.counts)


class Held:
    """Batches of (images, labels) in memory, empty ones left out.

    Attributes:
        sizes: number of images in each batch.
        total: number of images.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]):
        self.batches = [(images, as_classes(labels)) for images, labels in batches if len(labels)]
        self.whole: tuple[Tensor, Tensor] | None = None  # images and labels that the batches are parts of
        self.sizes = [len(labels) for _, labels in self.batches]
        self.total = sum(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def in_order(self, order: Tensor, sizes: Sequence[int]) -> "Held":
        """The same images in the order of the indices `order` (n,), in batches of these sizes."""
        images, labels = (in_order(parts, order) for parts in zip(*([self.whole] if self.whole else self.batches)))
        held = Held(zip(images.split(sizes), labels.split(sizes)))
        held.whole = images, labels
        return held


def growing_sizes(total: int, most: int, least: int) -> list[int]:
    """Sizes of batches of `total` images: few at first, where a failure shows, then twice as many up to `most`."""
    sizes, size = [], max(1, most // 32, least)
    while sum(sizes) < total:
        sizes.append(min(size, total - sum(sizes)))
        size = max(least, min(2 * size, most))
    if sizes[-1] < least and len(sizes) > 1:  # every process needs an image of every batch
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


def as_classes(labels: Tensor) -> Tensor:
    """`labels` as int64, the type of an index."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are the numbers of classes, not {labels.dtype}")
    return labels.long()


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of `images`, which are held: what a model did to them it would do again at every probe."""
    before = None if images.is_inference() else images._version
    logits = model(images)
    if before is not None and images._version != before:
        raise ValueError("the network changes the images it is given in place: let its forward work on a copy")
    return logits


def checked(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` as they are, where they are numbers (n, classes) that the labels (n,) can be compared with."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits are (n, classes) and labels (n,), the network's are {tuple(logits.shape)} and the labels "
            f"{tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the network has {logits.shape[1]} classes"
        )
    return finite(logits)


def finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the network's logits hold NaN or infinity; check its weights and the images")
    return logits


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Accuracy of `model` in percent over batches of (images, labels), in the model's own precision."""
    validation = Validation(batches)
    return 100 * validation.count_correct(model) / validation.total
