"""How many validation images a changed network classifies correctly, counted no further than a decision needs.

A probe of the search asks whether at least `needed` images are. The counters differ in what they compute for it:

- `Exact` runs every image in the network's own precision, and stops when a failure is certain.
- `Screened` gives the same answers. It runs every image in bfloat16 and settles in full precision those whose margin
  is so small that the error of bfloat16, as measured on this network and these images, could overturn it.
- `Bfloat16` runs every image in bfloat16 and leaves it at that: an approximation.
- `Sequential` draws images at random and accepts as soon as it is confident: an approximation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from urank.precision import has_fast_bfloat16
from urank.replay import Replay

SAFETY = 2.0  # an image is settled where its margin is within this many times the largest error of a margin so far


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, (n,); positive where the prediction is correct."""
    of_label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return of_label[:, 0] - others


class Exact:
    """Every image in the network's own precision.

    Args:
        network: is changed between counts by whoever searches.
        replay: of the same network, over the same images in the same order.
        total: how many images there are.
    """

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        self.network, self.replay, self.total = network, replay, total
        self.images = 0  # how many images were run, from the layer under search on

    def prepare(self) -> int | None:
        """Take note of the network with what was found so far in place; how many it gets right, where it is counted."""
        return None

    def count(self, needed: int) -> int | None:
        """How many images are classified correctly, or None as soon as it is certain that fewer than `needed` are."""
        correct = seen = 0
        for logits, labels in self.outputs():
            correct += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            if correct + self.total - seen < needed:
                return None
        return correct

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for logits, labels in self.replay:
            self.images += len(labels)
            yield logits, labels


class Bfloat16(Exact):
    """Every image in bfloat16: an approximation."""

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        outputs = super().outputs()
        while True:
            with self.bfloat16():
                batch = next(outputs, None)
            if batch is None:
                return
            yield batch[0].float(), batch[1]

    def bfloat16(self) -> torch.autocast:
        return torch.autocast(next(self.network.parameters()).device.type, torch.bfloat16)


class Screened(Bfloat16):
    """Every image in bfloat16, the doubtful ones again in full precision; the answers are those of `Exact`.

    Attributes:
        error: the largest difference between a margin in bfloat16 and in full precision that was seen so far.
        settled: how many images were run in full precision.
    """

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.error, self.settled = 0.0, 0

    def prepare(self) -> int | None:
        """Measure the error on the first batch, the images with the smallest margins."""
        exact, labels = next(iter(self.replay))
        screened, _ = next(self.outputs())
        self._learn(margins(exact, labels), margins(screened, labels))

    def count(self, needed: int) -> int | None:
        margin = self._screen(needed)
        doubtful = settled = torch.zeros_like(margin, dtype=torch.bool)
        while len(margin) == self.total and (doubtful := (margin.abs() <= SAFETY * self.error) & ~settled).any():
            exact = self._settle(doubtful)
            self._learn(exact, margin[doubtful])
            settled = settled | doubtful
            margin[doubtful] = exact
        correct = int((margin > 0).sum())
        return correct if len(margin) == self.total and correct >= needed else None

    def _screen(self, needed: int) -> Tensor:
        """Margins in bfloat16, (total,), or of fewer images where these are certain to be wrong too often."""
        screened, wrong = [], 0
        for logits, labels in self.outputs():
            screened.append(margins(logits, labels))
            wrong += int((screened[-1] < -SAFETY * self.error).sum())
            if self.total - wrong < needed:
                break
        return torch.cat(screened)

    def _settle(self, doubtful: Tensor) -> Tensor:
        """Margins in full precision of the images chosen by `doubtful` (total,), run whole."""
        first, exact = 0, []
        for images, labels in self.replay.batches:
            chosen = doubtful[first : first + len(labels)]
            first += len(labels)
            if chosen.any():
                exact.append(margins(self.network(images[chosen]), labels[chosen]))
        self.settled += int(doubtful.sum())
        return torch.cat(exact)

    def _learn(self, exact: Tensor, screened: Tensor) -> None:
        self.error = max(self.error, (exact - screened).abs().max().item())


class Sequential(Exact):
    """Images in random order until a test says, at the confidence asked for, that enough are classified correctly.

    A probe that is lost on few images is compared with the network before it, image by image. If so many more were
    lost that the probe should fail, L of N, then of n images drawn without replacement the number lost is
    hypergeometric; the probe passes when as few as were seen are less likely than 1 - confidence, shared evenly among
    the batches after which this is asked. Images gained are counted as far as they were seen. A failure is certain.
    """

    confidence = 0.95

    def prepare(self) -> int:
        self.right = torch.cat([logits.argmax(1) == labels for logits, labels in self.outputs()])
        return int(self.right.sum())

    def count(self, needed: int) -> int | None:
        """`needed` where the test accepts, else as `Exact`."""
        from scipy.stats import hypergeom  # takes a second, which only this counter waits for

        now, risk = self.right.new_zeros(0), (1 - self.confidence) / len(list(self.replay.batches))
        for logits, labels in self.outputs():
            now = torch.cat([now, logits.argmax(1) == labels])
            before = self.right[: len(now)]
            gained, lost = int((now & ~before).sum()), int((before & ~now).sum())
            too_many = int(self.right.sum()) + gained - needed + 1
            if int(now.sum()) + self.total - len(now) < needed:
                return None
            if too_many <= int(self.right.sum()) and hypergeom.cdf(lost, self.total, too_many, len(now)) <= risk:
                return needed
        return int(now.sum())


COUNTERS: dict[str, Callable] = dict(exact=Exact, screened=Screened, bfloat16=Bfloat16, sequential=Sequential)


def choose_counter(evaluation: str, network: nn.Module) -> type[Exact]:
    """The counter called `evaluation`; "auto" screens where the device multiplies bfloat16 in hardware.

    Raises:
        ValueError: no counter of this name.
    """
    if evaluation == "auto":
        parameter = next(network.parameters())
        screens = parameter.dtype == torch.float32 and has_fast_bfloat16(parameter.device)
        evaluation = "screened" if screens else "exact"
    if evaluation not in COUNTERS:
        raise ValueError(f"evaluation is 'auto' or one of {', '.join(COUNTERS)}, got {evaluation!r}")
    return COUNTERS[evaluation]
