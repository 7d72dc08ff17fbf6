"""Decide a probe: are at least `needed` validation images still classified correctly?

`search_ranks` offers two ways, `evaluation="exact"` and `evaluation="fast"`:

- `ExactCounter` runs every image in the network's own precision. It stops early only when a failure is certain.
- `FastCounter` skips images that the probe is unlikely to change. It sorts the images by margin: the label's logit
  minus the largest other logit. It runs them in this order. It stops when the smallest remaining margin exceeds
  `SAFETY` times the largest margin loss seen so far. When a layer is done, the skipped images are run as well. If one
  of them is wrong, the layer is searched again without skipping.
- `ScreenedCounter` is the fast counter for devices that multiply bfloat16 faster than float32. It runs images in
  bfloat16 and repeats those in full precision whose margin is smaller than `SAFETY` times the largest bfloat16 error
  seen so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import cast

import torch
from torch import Tensor, nn

from urank.distributed import totals
from urank.numerics import has_fast_bfloat16
from urank.search.replay import Replay, ReusableBatches
from urank.search.validation import Judged, judge, margins

EVALUATIONS = ("exact", "fast")
SAFETY = 2.0  # how many times the largest loss or error seen so far counts as possible
MIN_SHARE_RUN = 0.1  # share of the images that the largest loss is measured on; 5 % was too little for a ResNet18
FULL_PRECISION_BATCH = 256  # images per batch, or slightly more, when images are repeated in full precision


class ExactCounter:
    """Count correct images in the network's own precision.

    Args:
        network: the network under search; the caller changes its weights between counts.
        replay: a `Replay` of the same network over the validation images.
        total: number of validation images, over all processes.

    Attributes:
        images: number of images run so far, from the layer under search on.
    """

    evaluation = "exact"

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        self.network, self.replay, self.total = network, replay, total
        self.images = 0

    @property
    def precision(self) -> str:
        """Return the number format in which images are run."""
        return str(next(self.network.parameters()).dtype).removeprefix("torch.")

    def start_from(self, judged: list[Judged]) -> None:
        """Take over margins and correctness of every batch, as the unmodified network gives them."""

    def sort_images(self) -> None:
        """Sort the images by their current margins, where these are known."""

    def begin_side(self, correct: int) -> int:
        """Prepare to search one side of a layer; return how many images are correct now."""
        return correct

    def count(self, needed: int) -> int | None:
        """Return how many images are classified correctly, or None once it is certain that fewer than `needed` are."""
        wrong = 0
        for logits, labels in self.outputs():
            wrong += totals(int((logits.argmax(1) != labels).sum()))[0]
            if self.total - wrong < needed:
                return None
        return self.total - wrong

    def finish_layer(self, correct: int) -> int:
        """Check the layer's final projections on every image; return how many images are correct."""
        return correct

    def reset(self) -> None:
        """Forget all margins: the weights were changed by somebody else than the current search."""

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits, labels) of every batch, starting with batch number `first`."""
        for logits, labels in self.replay.since(first):
            self.images += len(labels)
            yield logits, labels


class WrongSkip(Exception):
    """An image that was skipped because it was expected to stay correct is wrong."""


@dataclass
class Judgements:
    """Margins of the images that were run, and which of these images are correct.

    Attributes:
        first: number of the first batch.
        parts: for each batch, margins (n,), whether each image is correct (n,), and whether this was found in full
            precision although the probe runs in another one (n,).
    """

    first: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor) -> Judged:
        """Judge another batch and return its part."""
        margin, right = judge(logits, labels)
        self.parts.append((margin, right, torch.zeros_like(right)))
        return margin, right

    @property
    def margins(self) -> list[Tensor]:
        return [margin for margin, _, _ in self.parts]

    @property
    def wrong(self) -> int:
        return sum(int((~right).sum()) for _, right, _ in self.parts)


class FastCounter(ExactCounter):
    """Count correct images from the smallest margin on, and skip those that the probe is unlikely to change.

    A probe runs at least a tenth of the images. Then it stops as soon as every remaining margin is larger than `safety`
    times the largest margin loss that it has caused so far. The remaining images count as correct, so the count of a
    passing probe is an upper bound. `finish_layer` runs what the last passing probe of the layer skipped.

    With several processes, each one decides on its own share of the images, and all must agree to stop.

    Attributes:
        safety: doubled after each layer in which a skipped image was wrong.
        may_skip: False while such a layer is searched again.
    """

    evaluation = "fast"

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.safety, self.may_skip = SAFETY, True
        self.reset()

    @property
    def uncertainty(self) -> float:
        """Margins closer to zero than this do not decide whether an image is correct; 0 in full precision."""
        return 0.0

    def reset(self) -> None:
        self.reference: list[Tensor] = []  # margins of every batch when all images were run last
        self.latest: list[Tensor] = []  # margins after the last passing probe, of the batches that it ran
        self.wrong = 0  # how many images are wrong in these batches
        self.batches_before_side = 0  # how many batches were run when the search of this side began

    def start_from(self, judged: list[Judged]) -> None:
        self.latest = [margin for margin, _ in judged]
        self.wrong = sum(int((~right).sum()) for _, right in judged)

    def sort_images(self) -> None:
        margin, sizes = torch.cat(self.latest or [torch.empty(0)]), [len(part) for part in self.latest]
        if (margin.diff() < 0).any():
            order = margin.argsort(stable=True)
            self.latest = list(margin[order].split(sizes))
            self.replay.reorder(cast(ReusableBatches, self.replay.batches).in_order(order, sizes), order, sizes)

    def begin_side(self, correct: int) -> int:
        if not self.latest:
            everything = self._from(0)
            self.latest, self.wrong = everything.margins, everything.wrong
        self.batches_before_side = len(self.latest)
        if len(self.latest) >= len(self.reference):  # all images were run
            self.reference = self.latest
            smallest = torch.stack([margin.min() for margin in self.reference])
            self.smallest_from = [*smallest.flip(0).cummin(0).values.flip(0).tolist(), inf]  # from each batch on
        return self.total - totals(self.wrong)[0]

    def count(self, needed: int) -> int | None:
        found, correct = self._run(needed)
        if correct < needed:
            return None
        self.latest, self.wrong = found.margins, found.wrong
        return correct

    def _run(self, needed: int) -> tuple[Judgements, int]:
        """Judge batches until the others can be skipped or too many are wrong; return how many may be correct."""
        found, wrong, loss, run = Judgements(), 0, 0.0, 0
        at_least = MIN_SHARE_RUN * sum(map(len, self.reference))
        for batch, before, smallest_left in zip(self.outputs(), self.reference, self.smallest_from[1:]):
            margin, right = found.add(*batch)
            loss, run = max(loss, largest(before - margin)), run + len(margin)
            skips = self.may_skip and run >= at_least and smallest_left > self.safety * loss + self.uncertainty
            new_wrong, processes_left = totals(int((~right).sum()), not (skips or smallest_left == inf))
            wrong += new_wrong
            if self.total - wrong < needed or not processes_left:
                self.settle(found)
                [wrong] = totals(found.wrong)
                if self.total - wrong < needed or not processes_left:
                    break
        return found, self.total - wrong

    def _from(self, first: int) -> Judgements:
        """Judge all batches from number `first` on."""
        found = Judgements(first)
        for batch in self.outputs(first):
            found.add(*batch)
        self.settle(found)
        return found

    def finish_layer(self, correct: int) -> int:
        """Run the skipped images.

        Raises:
            WrongSkip: an image that was skipped on either side of the layer is wrong.
        """
        first = len(self.latest)
        if first < len(self.reference):
            others = self._from(first)
            self.latest, self.wrong = self.latest + others.margins, self.wrong + others.wrong
        skipped = self.latest[min(first, self.batches_before_side) :]
        if totals(sum(int((margin <= 0).sum()) for margin in skipped))[0]:
            self.safety, self.may_skip = 2 * self.safety, False
            raise WrongSkip
        self.may_skip = True
        return self.begin_side(correct)

    def settle(self, found: Judgements) -> None:
        """Make certain which images are correct; in full precision they all are."""


class ScreenedCounter(FastCounter):
    """A `FastCounter` that runs images in bfloat16 and repeats uncertain ones in full precision.

    Attributes:
        error: largest difference seen so far between a margin in bfloat16 and in full precision.
        images_repeated: number of images that were repeated in full precision.
    """

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.error, self.images_repeated = 0.0, 0

    @property
    def precision(self) -> str:
        return "bfloat16"

    @property
    def uncertainty(self) -> float:
        return SAFETY * self.error

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return in_bfloat16(super().outputs(first), self.network)

    def begin_side(self, correct: int) -> int:
        """Measure the bfloat16 error on the first batch, the images with the smallest margins."""
        exact, labels = next(iter(self.replay))
        rounded, _ = next(self.outputs())
        self._measure_error(margins(exact, labels), margins(rounded, labels))
        return super().begin_side(correct)

    def settle(self, found: Judgements) -> None:
        """Repeat uncertain images in full precision, each at most once."""
        if not found.parts:
            return
        margin, right, repeated = (torch.cat(column) for column in zip(*found.parts))
        while (uncertain := ~(margin.abs() >= self.uncertainty) & ~repeated).any():  # True for NaN as well
            exact, right[uncertain] = self._in_full_precision(uncertain, found.first)
            self._measure_error(exact, margin[uncertain])
            margin[uncertain] = exact.to(margin)
            repeated |= uncertain
        sizes = [len(part) for part in found.margins]
        found.parts = list(zip(*(whole.split(sizes) for whole in (margin, right, repeated))))

    def _in_full_precision(self, selected: Tensor, first: int) -> Judged:
        """Judge the images where `selected` (images,) is True; its first element belongs to batch number `first`."""
        judged = [judge(*batch) for batch in self.replay.chosen(selected.cpu(), first, FULL_PRECISION_BATCH)]
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        self.images_repeated += len(right)
        return margin, right

    def _measure_error(self, exact: Tensor, rounded: Tensor) -> None:
        self.error = max(self.error, largest((exact - rounded).abs()))


def largest(differences: Tensor) -> float:
    """Return the maximum; NaN counts as infinite."""
    return differences.nan_to_num(nan=inf, posinf=inf).max().item()


def in_bfloat16(outputs: Iterator[tuple[Tensor, Tensor]], network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same (logits, labels), computed in bfloat16 by autocast.

    Autocast must not cache weights, because each probe has others. It is switched off while the caller has a batch.
    """
    device = next(network.parameters()).device.type
    while True:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            batch = next(outputs, None)
        if batch is None:
            return
        yield batch[0].float(), batch[1]


def counter_for(evaluation: str, network: nn.Module) -> type[ExactCounter]:
    """Return the counter class for "exact" or "fast".

    Raises:
        ValueError: `evaluation` is neither.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation must be 'exact' or 'fast', got {evaluation!r}")
    if evaluation == "exact":
        return ExactCounter
    parameter = next(network.parameters())
    screens = parameter.dtype == torch.float32 and has_fast_bfloat16(parameter.device)
    return ScreenedCounter if screens else FastCounter
