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
        self.latest, self.wrong = self.settle(judged)

    def sort_images(self) -> None:
        margin, sizes = torch.cat(self.latest or [torch.empty(0)]), [len(part) for part in self.latest]
        if (margin.diff() < 0).any():
            order = margin.argsort(stable=True)
            self.latest = list(margin[order].split(sizes))
            self.replay.reorder(cast(ReusableBatches, self.replay.batches).in_order(order, sizes), order, sizes)

    def begin_side(self, correct: int) -> int:
        if not self.latest:
            self.start_from([judge(*batch) for batch in self.outputs()])
        self.batches_before_side = len(self.latest)
        if len(self.latest) >= len(self.reference):  # all images were run
            self.reference = self.latest
            smallest = torch.stack([margin.min() for margin in self.reference])
            self.smallest_from = [*smallest.flip(0).cummin(0).values.flip(0).tolist(), inf]  # from each batch on
        return self.total - totals(self.wrong)[0]

    def count(self, needed: int) -> int | None:
        judged = self._run(needed)
        if judged is None:
            return None
        margin, own_wrong = self.settle(judged)
        [wrong] = totals(own_wrong)
        if self.total - wrong < needed:
            return None
        self.latest, self.wrong = margin, own_wrong
        return self.total - wrong

    def _run(self, needed: int) -> list[Judged] | None:
        """Judge batches until the remaining ones can be skipped; None once it is certain that too many are wrong."""
        judged, wrong, loss, run = [], 0, 0.0, 0
        at_least = MIN_SHARE_RUN * sum(map(len, self.reference))
        for batch, before, smallest_left in zip(self.outputs(), self.reference, self.smallest_from[1:]):
            margin, right = judge(*batch)
            judged.append((margin, right))
            loss, run = max(loss, largest(before - margin)), run + len(margin)
            certainly_wrong = ~right & (margin.abs() >= self.uncertainty)
            safe = self.may_skip and run >= at_least and smallest_left > self.safety * loss + self.uncertainty
            new_wrong, processes_left = totals(int(certainly_wrong.sum()), not safe)
            wrong += new_wrong
            if self.total - wrong < needed:
                return None
            if not processes_left:
                break
        return judged

    def finish_layer(self, correct: int) -> int:
        """Run the skipped images.

        Raises:
            WrongSkip: an image that was skipped on either side of the layer is wrong.
        """
        first = len(self.latest)
        if first < len(self.reference):
            margin, wrong = self.settle([judge(*batch) for batch in self.outputs(first)], first)
            self.latest, self.wrong = self.latest + margin, self.wrong + wrong
        skipped = self.latest[min(first, self.batches_before_side) :]
        if totals(sum(int((margin <= 0).sum()) for margin in skipped))[0]:
            self.safety, self.may_skip = 2 * self.safety, False
            raise WrongSkip
        self.may_skip = True
        return self.begin_side(correct)

    def settle(self, judged: list[Judged], first: int = 0) -> tuple[list[Tensor], int]:
        """Return margins per batch and the number of wrong images, for the batches from number `first` on."""
        return [margin for margin, _ in judged], sum(int((~right).sum()) for _, right in judged)


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

    def settle(self, judged: list[Judged], first: int = 0) -> tuple[list[Tensor], int]:
        if not judged:
            return [], 0
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        settled = torch.zeros_like(right)
        while (uncertain := ~(margin.abs() >= self.uncertainty) & ~settled).any():  # True for NaN as well
            exact, right[uncertain] = self._in_full_precision(uncertain, first)
            self._measure_error(exact, margin[uncertain])
            margin[uncertain] = exact.to(margin)
            settled |= uncertain
        return list(margin.split([len(part) for part, _ in judged])), int((~right).sum())

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
