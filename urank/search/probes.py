"""How many validation images a changed network classifies correctly, counted no further than a decision needs.

A probe of the search asks whether at least `needed` images are. The counters differ in what they compute for it:

- `Exact` runs every image in the network's own precision, and stops when a failure is certain.
- `Near` leaves out the images whose margin is more than twice the largest loss of a margin that the probe was seen to
  cause on a tenth of the images or more. They are run when a layer is done, and where that contradicts, the layer is
  searched again.
- `Screened` does this in bfloat16 and settles in full precision the images whose margin is smaller than twice the
  largest error that bfloat16 was seen to make until then on this network and these images.
- `Bfloat16` runs every image in bfloat16 and leaves it at that: an approximation.
- `Sequential` draws images at random and accepts as soon as it is confident: an approximation.
"""

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor, nn

from urank.distributed import totals
from urank.numerics import has_fast_bfloat16
from urank.search.replay import Replay

# An image is run where its margin is within this many times the largest loss of a margin so far, or settled where it is
# within this many times the largest error.
SAFETY = 2.0
LEAST = 0.1  # the share of the images on which the largest loss is seen; on 5 % it was too small for a ResNet18's

TOGETHER = 256  # images that are settled in one batch, or somewhat more

Judged = tuple[Tensor, Tensor]  # of some images: margins (n,) and who is right (n,)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, (n,): positive where the label is predicted, zero in a tie."""
    of_label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return of_label[:, 0] - others


def judge(logits: Tensor, labels: Tensor) -> Judged:
    """Margins, and who is right: of equal logits the first is the answer."""
    return margins(logits, labels), logits.argmax(1) == labels


def largest(differences: Tensor) -> float:
    """NaN, of which nothing is known, counts as infinite."""
    return differences.nan_to_num(nan=inf, posinf=inf).max().item()


def in_bfloat16(outputs: Iterator[tuple[Tensor, Tensor]], network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The same (logits, labels), computed in bfloat16.

    Autocast keeps no copy of a weight: the next probe has another one. It is left before a batch is handed out.
    """
    device = next(network.parameters()).device.type
    while True:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            batch = next(outputs, None)
        if batch is None:
            return
        yield batch[0].float(), batch[1]


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

    def know(self, judged: list[Judged]) -> None:
        """What the network as it is answers to every batch; who need not know ignores it."""

    def prepare(self, correct: int) -> int:
        """Take note of the network before a side is searched; how many are right, `correct` if not counted."""
        return correct

    def confirm(self, correct: int) -> int:
        """The same when both sides of a layer are done, of every image."""
        return self.prepare(correct)

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

    Out of reach is a margin, when all were known last, of more than `safety` times the most that an image's was seen to
    lose since, by this probe and what stays in place: of a tenth of all images at least (in one of several processes,
    of its own). The probe is presumed to leave such an image right. So a failure is certain, but for the number that
    it is compared with, and a success presumed, until `confirm` runs what the last passing probe of a layer left out.

    Attributes:
        safety: twice as large after each layer in which a presumption proved wrong.
        presumes: whether an image may be left out; not while such a layer is searched again.
        doubt: a margin closer to zero than this does not say for certain who is right; here every margin does.
    """

    doubt = 0.0

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.safety, self.presumes = SAFETY, True
        self.forget()

    def forget(self) -> None:
        self.before: list[Tensor] = []  # of every batch: the margins when all were known last
        self.passed: list[Tensor] = []  # of the first batches, which the last passing probe ran: the margins it left
        self.wrong = 0  # of the same images: how many it left wrong
        self.certain = 0  # how many of the batches were run before the side that is searched

    def know(self, judged: list[Judged]) -> None:
        self.passed, self.wrong = self.decided(judged)

    def prepare(self, correct: int) -> int:
        if not self.passed:
            self.know([judge(*batch) for batch in self.outputs()])
        self.certain = len(self.passed)
        if len(self.passed) >= len(self.before):  # known of every image
            self.before = self.passed
            least = torch.stack([margin.min() for margin in self.before])
            self.least_left = [*least.flip(0).cummin(0).values.flip(0).tolist(), inf]  # from each batch on
        return self.total - totals(self.wrong)[0]

    def confirm(self, correct: int) -> int:
        """Run what was left out.

        Raises:
            WrongPresumption: an image that was left out on either side is answered wrong.
        """
        first = len(self.passed)
        if first < len(self.before):
            margin, wrong = self.decided([judge(*batch) for batch in self.outputs(first)], first)
            self.passed, self.wrong = self.passed + margin, self.wrong + wrong
        if totals(sum(int((margin <= 0).sum()) for margin in self.passed[min(first, self.certain) :]))[0]:
            self.safety, self.presumes = 2 * self.safety, False
            raise WrongPresumption
        self.presumes = True
        return self.prepare(correct)

    def sort(self) -> None:
        margin, sizes = torch.cat(self.passed or [torch.empty(0)]), [len(part) for part in self.passed]
        if (margin.diff() < 0).any():
            order = margin.argsort(stable=True)
            self.passed = list(margin[order].split(sizes))
            self.replay.reorder(self.replay.batches.in_order(order, sizes), order, sizes)

    def count(self, needed: int) -> int | None:
        reached = self._reached(needed)
        if reached is None:
            return None
        margin, own_wrong = self.decided(reached)
        [wrong] = totals(own_wrong)
        if self.total - wrong < needed:
            return None
        self.passed, self.wrong = margin, own_wrong
        return self.total - wrong

    def _reached(self, needed: int) -> list[Judged] | None:
        """The first batches, as far as the probe reaches; None as soon as it is certain that too many are wrong."""
        judged, wrong, lost, seen, enough = [], 0, 0.0, 0, LEAST * sum(map(len, self.before))
        for batch, before, least_left in zip(self.outputs(), self.before, self.least_left[1:]):
            margin, right = judge(*batch)
            judged.append((margin, right))
            lost, seen = max(lost, largest(before - margin)), seen + len(margin)
            certainly_wrong = ~right & (margin.abs() >= self.doubt)
            out_of_reach = self.presumes and seen >= enough and least_left > self.safety * lost + self.doubt
            news, within_reach = totals(int(certainly_wrong.sum()), not out_of_reach)
            wrong += news
            if self.total - wrong < needed:
                return None
            if not within_reach:
                break
        return judged

    def decided(self, judged: list[Judged], first: int = 0) -> tuple[list[Tensor], int]:
        """Of the batches from the `first` on: margins, and how many images are wrong when no doubt is left."""
        return [margin for margin, _ in judged], sum(int((~right).sum()) for _, right in judged)


class Screened(Near):
    """As `Near`, but in bfloat16, and the images in doubt again in full precision.

    Attributes:
        error: the largest difference between a margin in bfloat16 and in full precision that was seen so far.
        images_settled: how many images were run in full precision because they were in doubt.
    """

    def __init__(self, network: nn.Module, replay: Replay, total: int):
        super().__init__(network, replay, total)
        self.error, self.images_settled = 0.0, 0

    @property
    def doubt(self) -> float:
        return SAFETY * self.error

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return in_bfloat16(super().outputs(first), self.network)

    def prepare(self, correct: int) -> int:
        """Measure the error on the first batch, the images with the smallest margins, as well."""
        exact, labels = next(iter(self.replay))
        screened, _ = next(self.outputs())
        self._learn(margins(exact, labels), margins(screened, labels))
        return super().prepare(correct)

    def decided(self, judged: list[Judged], first: int = 0) -> tuple[list[Tensor], int]:
        if not judged:
            return [], 0
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        settled = torch.zeros_like(right)
        while (doubtful := ~(margin.abs() >= self.doubt) & ~settled).any():  # NaN as well
            exact, right[doubtful] = self._in_full_precision(doubtful, first)
            self._learn(exact, margin[doubtful])
            margin[doubtful] = exact.to(margin)
            settled |= doubtful
        return list(margin.split([len(part) for part, _ in judged])), int((~right).sum())

    def _in_full_precision(self, marks: Tensor, first: int) -> Judged:
        """Of the images where `marks` (images,) is true, which begin with the batch `first`."""
        judged = [judge(*batch) for batch in self.replay.chosen(marks.cpu(), first, TOGETHER)]
        margin, right = (torch.cat(parts) for parts in zip(*judged))
        self.images_settled += len(right)
        return margin, right

    def _learn(self, exact: Tensor, screened: Tensor) -> None:
        self.error = max(self.error, largest((exact - screened).abs()))


class Bfloat16(Exact):
    """Every image in bfloat16: an approximation."""

    def outputs(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return in_bfloat16(super().outputs(first), self.network)


class Sequential(Exact):
    """Images in random order until a test says, at the confidence asked for, that enough are classified correctly.

    A probe that is lost on few images is compared with the network before it, image by image. If so many more were
    lost that the probe should fail, L of N, then of n images drawn without replacement the number lost is
    hypergeometric; the probe passes when as few as were seen are less likely than 1 - confidence, shared evenly among
    the batches after which this is asked. Images gained are counted as far as they were seen. A failure is certain.
    """

    confidence = 0.95

    def prepare(self, correct: int) -> int:
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


APPROXIMATIONS = (Bfloat16, Sequential)
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
