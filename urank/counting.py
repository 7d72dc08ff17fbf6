"""How many validation images a changed network classifies correctly, counted no further than a decision needs.

A probe of the search asks whether at least `needed` images are. The counters differ in what they compute for it:

- `Exact` runs every image in the network's own precision, and stops when a failure is certain.
- `Near` leaves out the images whose margin is more than twice the largest loss of a margin that the probe was seen to
  cause. They are run for the last probe that passed on a side, and where that contradicts, the side is searched again.
- `Screened` runs every image in bfloat16 and settles in full precision those whose margin is within twice the largest
  error that bfloat16 was seen to make on this network and these images. Its answers are those of `Exact` unless another
  image's margin moved further.
- `Bfloat16` runs every image in bfloat16 and leaves it at that: an approximation.
- `Sequential` draws images at random and accepts as soon as it is confident: an approximation.
"""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor, nn

from urank.distributed import totals
from urank.precision import has_fast_bfloat16
from urank.replay import Replay

# An image is run where its margin is within this many times the largest loss of a margin so far, or settled where it is
# within this many times the largest error.
SAFETY = 2.0

TOGETHER = 256  # images that are settled in one batch, or somewhat more


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, (n,): positive where the label is predicted, zero in a tie."""
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

    def sort(self) -> None:
        """Put the images in the order of their margins as they are now, where these are known."""

    def count(self, needed: int) -> int | None:
        """How many images are classified correctly, or None as soon as it is certain that fewer than `needed` are."""
        wrong = 0
        for logits, labels in self.outputs():
            wrong += totals(int((logits.argmax(1) != labels).sum()))[0]
            if self.total - wrong < needed:
                return None
        return self.total - wrong

    def forget(self) -> None:
        """The network is another one: what is known of its answers does not count."""

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of every batch but the `first`."""
        for logits, labels in self.replay.since(first):
            self.images += len(labels)
            yield logits, labels


class WrongPresumption(Exception):
    """An image that a passing probe was presumed to leave right is answered wrong."""


class Near(Exact):
    """Images from the smallest margin on, until those that are left are out of the probe's reach.

    Out of reach is a margin, before the probe, of more than `safety` times the most that the probe took from the margin
    of an image so far: the probe is presumed to leave such an image right. So a failure is certain and a success
    presumed, until `prepare` runs what the last passing probe left out.

    Attributes:
        safety: infinite, so that every image is run, from the first presumption on that proved wrong.
    """

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.safety = SAFETY
        self.forget()

    def forget(self) -> None:
        self.before: list[Tensor] = []  # of every batch: the margins before a probe
        self.passed: list[Tensor] = []  # of the first batches, which the last passing probe ran: the margins it left
        self.wrong = 0  # of the same images: how many it left wrong

    def prepare(self) -> int:
        """Run what was left out.

        Raises:
            WrongPresumption: an image of it is answered wrong.
        """
        left_out_wrong = 0
        for logits, labels in self.outputs(len(self.passed)):
            self.passed.append(margins(logits, labels))
            left_out_wrong += int((logits.argmax(1) != labels).sum())
        self.wrong += left_out_wrong
        [wrong, left_out_wrong] = totals(self.wrong, left_out_wrong)
        if self.before and left_out_wrong:
            self.safety = inf
            raise WrongPresumption
        self.before = self.passed
        least = torch.stack([margin.min() for margin in self.before])
        self.least_left = [*least.flip(0).cummin(0).values.flip(0).tolist(), inf]  # from each batch on
        return self.total - wrong

    def sort(self) -> None:
        if self.passed:
            margin, sizes = torch.cat(self.passed), [len(part) for part in self.passed]
            order = margin.argsort(stable=True)
            self.passed = list(margin[order].split(sizes))
            self.replay.reorder(self.replay.batches.in_order(order, sizes), order)

    def count(self, needed: int) -> int | None:
        passed, own_wrong, wrong, lost = [], 0, 0, 0.0
        for (logits, labels), before, least_left in zip(self.outputs(), self.before, self.least_left[1:]):
            passed.append(margins(logits, labels))
            lost = max(lost, (before - passed[-1]).max().item())
            news = int((logits.argmax(1) != labels).sum())
            own_wrong += news
            news, within_reach = totals(news, not least_left > self.safety * lost)  # also where that is inf x 0
            wrong += news
            if self.total - wrong < needed:
                return None
            if not within_reach:
                break
        self.passed, self.wrong = passed, own_wrong
        return self.total - wrong


class Bfloat16(Exact):
    """Every image in bfloat16: an approximation."""

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        outputs = super().outputs(first)
        while True:
            with self.bfloat16():
                batch = next(outputs, None)
            if batch is None:
                return
            yield batch[0].float(), batch[1]

    def bfloat16(self) -> torch.autocast:
        """bfloat16 autocast that keeps no copy of a weight: the next probe has another one."""
        return torch.autocast(next(self.network.parameters()).device.type, torch.bfloat16, cache_enabled=False)


class Screened(Bfloat16):
    """Every image in bfloat16, the doubtful ones again in full precision, for the answers of `Exact`.

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
        if margin is None:
            return None
        right, settled = margin > 0, torch.zeros_like(margin, dtype=torch.bool)
        while (doubtful := (margin.abs() <= SAFETY * self.error) & ~settled).any():
            exact, right[doubtful] = self._settle(doubtful)
            self._learn(exact, margin[doubtful])
            settled |= doubtful
            margin[doubtful] = exact
        [correct] = totals(int(right.sum()))
        return correct if correct >= needed else None

    def _screen(self, needed: int) -> Tensor | None:
        """Margins (images,) in bfloat16; None as soon as it is certain that too many are wrong."""
        screened, wrong = [], 0
        for logits, labels in self.outputs():
            screened.append(margins(logits, labels))
            wrong += totals(int((screened[-1] < -SAFETY * self.error).sum()))[0]
            if self.total - wrong < needed:
                return None
        return torch.cat(screened)

    def _settle(self, doubtful: Tensor) -> tuple[Tensor, Tensor]:
        """Of the images chosen by `doubtful` (images,), run whole in full precision: margins, and who is correct."""
        answers = [(self.network(images), labels) for images, labels in self._chosen(doubtful.cpu())]
        logits, labels = (torch.cat(parts) for parts in zip(*answers))
        self.settled += len(labels)
        return margins(logits, labels), logits.argmax(1) == labels

    def _chosen(self, marks: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Images and labels where `marks` (images,) is true, gathered from all batches into few of `TOGETHER`."""
        first, waiting, gathered = 0, 0, []
        for images, labels in self.replay.batches:
            rows = marks[first : first + len(labels)].nonzero()[:, 0].to(images.device)
            first, waiting = first + len(labels), waiting + len(rows)
            gathered.append((images[rows], labels[rows]))
            if waiting >= TOGETHER or first == len(marks) and waiting:
                yield tuple(torch.cat(parts) for parts in zip(*gathered))
                waiting, gathered = 0, []

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
        right = [logits.argmax(1) == labels for logits, labels in self.outputs()]
        self.right, self.batches = torch.cat(right), len(right)
        [self.before] = totals(int(self.right.sum()))
        return self.before

    def count(self, needed: int) -> int | None:
        """`needed` where the test accepts, else as `Exact`."""
        from scipy.stats import hypergeom  # takes a second, which only this counter waits for

        gained = lost = wrong = seen = own = 0
        risk = (1 - self.confidence) / self.batches
        for logits, labels in self.outputs():
            now, before = logits.argmax(1) == labels, self.right[own : own + len(labels)]
            own += len(labels)
            news = totals(*(int(images.sum()) for images in (now & ~before, before & ~now, ~now)), len(labels))
            gained, lost, wrong, seen = (old + new for old, new in zip((gained, lost, wrong, seen), news))
            if self.total - wrong < needed:
                return None
            too_many = self.before + gained - needed + 1
            if too_many <= self.before and hypergeom.cdf(lost, self.total, too_many, seen) <= risk:
                return needed
        return self.before + gained - lost


COUNTERS: dict[str, type[Exact]] = dict(
    exact=Exact, near=Near, screened=Screened, bfloat16=Bfloat16, sequential=Sequential
)


def choose_counter(evaluation: str, network: nn.Module) -> type[Exact]:
    """The counter called `evaluation`; "auto" screens a float32 network where bfloat16 is fast, else runs near images.

    Raises:
        ValueError: no counter of this name.
    """
    if evaluation == "auto":
        parameter = next(network.parameters())
        screens = parameter.dtype == torch.float32 and has_fast_bfloat16(parameter.device)
        evaluation = "screened" if screens else "near"
    if evaluation not in COUNTERS:
        raise ValueError(f"evaluation is 'auto' or one of {', '.join(COUNTERS)}, got {evaluation!r}")
    return COUNTERS[evaluation]
