"""Search the smallest (k_S, k_T) that a tolerance allows, layer by layer, by bisection (sections 2.2 and 5.3).

The paper leaves the protocol open. We search the layers in the order of the forward pass. In each layer we bisect k_S
first, and then k_T with P_S in place. A probe puts W' = P_S W P_T into the network. It passes when enough validation
images are still classified correctly.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from urank._version import __version__
from urank.attention import unfused_attention
from urank.deadline import check_time
from urank.distributed import totals
from urank.factorize import project_layer
from urank.files import read_json, tensors_digest, write_json
from urank.layers import evaluating, matrix_layers, set_weight_matrix, weight_matrix
from urank.plan import LayerRank, Probe, RankPlan
from urank.search.probes import MIN_SHARE_RUN, ExactCounter, WrongSkip, counter_for
from urank.search.protocol import SIDES, Protocol
from urank.search.replay import Replay
from urank.search.validation import Judged, Validation, judge
from urank.subspaces import Spectrum, layer_spectra, project_weight, utilized_rank


def search_ranks(
    model: nn.Module,
    grams: Mapping[str, Tensor],
    validation: Validation | Iterable[tuple[Tensor, Tensor]],
    tolerance: float = 0.1,
    mode: str = "joint",
    evaluation: str = "fast",
    memory: int | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    budget: float | None = None,
    sides: str = "both",
) -> RankPlan:
    """Find the utilized rank of every layer in `grams`, in their order, under an accuracy tolerance.

    Each side of a layer is bisected over its dimensions. k passes when at least `reference - floor(tolerance N / 100)`
    of the N validation images are classified correctly. If no smaller k passes, the side is not projected.

    With a budget for the whole network, k passes in projection i of n when at least
    `unmodified - floor(i/n budget N / 100)` images are correct: what one projection does not use, later ones may.

    Args:
        model: the network; it is not changed.
        grams: X^T X (d, d) of every layer to search, from `accumulate_grams` on the unmodified network.
        validation: a `Validation`, or batches of (images, labels) on the model's device.
        tolerance: epsilon, the accuracy points that one projection may cost.
        mode: "joint" leaves each projection in place and compares the next one with the network just before it, so at
            most 2 L epsilon points are lost over L layers. "isolated" searches each layer in the otherwise unmodified
            network: k_S may cost epsilon, k_S and k_T together 2 epsilon.
        evaluation: how a probe is decided (see `urank.search.probes`). "exact" runs every validation image unless
            failure is certain. "fast" skips images whose margin is far larger than any loss the probe has caused so
            far; it can decide a probe differently from "exact", which is rare.
        memory: bytes of activations to keep between probes; default: see `Replay`.
        progress: show a progress bar.
        checkpoint: file that is rewritten after every layer. An interrupted search resumes from it.
        deadline: value of `time.monotonic()` by which to stop. After its first layer, the search starts no layer that
            would end after the deadline if it took as long as the last one.
        budget: accuracy points that all projections together may cost, in place of `tolerance`; only in joint mode.
        sides: "both", or "input" or "output" to project only this side.

    Raises:
        ValueError: `tolerance` or `budget` is not between 0 and 100; `mode`, `evaluation` or `sides` is unknown; there
            is no validation image; a Gram matrix belongs to no layer or has the wrong shape; the network has no output
            for a label; or the checkpoint is of another search.
        FloatingPointError: the network's logits or a Gram matrix contain NaN or infinity.
        OutOfTime: the deadline is too close for the remaining layers.

    Example:
        >>> import torch, urank
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
        >>> images = torch.randn(64, 8)
        >>> grams = urank.accumulate_grams(model, [images], progress=False)
        >>> with torch.no_grad():
        ...     labels = model(images).argmax(1)
        >>> plan = urank.search_ranks(model, grams, [(images, labels)], tolerance=5, progress=False)
        >>> [layer.layer for layer in plan.layers]
        ['0', '2']
    """
    protocol = Protocol(tolerance, mode, budget, sides)
    network = copy.deepcopy(model)
    check_grams(network, grams)
    if not isinstance(validation, Validation):
        validation = Validation(validation)
    search = _Search(network, validation, protocol, len(grams), evaluation, memory)
    identity = "" if checkpoint is None else search.identity(grams)
    if checkpoint is not None and checkpoint.exists():
        search.resume(checkpoint, identity, grams)
    left = list(grams)[len(search.found) :]
    bar = tqdm(left, "rank search", len(grams), initial=len(search.found), unit="layer", disable=not progress)
    with evaluating(network), unfused_attention(network), bar:
        for number, name in enumerate(bar, 1):
            start = time.monotonic()
            search.found.append(search.layer(name, grams[name], bar))
            if checkpoint is not None:
                write_json(checkpoint, dict(search=identity, plan=search.plan().to_dict()))
            if number < len(left):
                remaining = f"the rank search has {len(left) - number} of {len(grams)} layers left"
                check_time(deadline, remaining, time.monotonic() - start)
    return search.plan()


def check_grams(model: nn.Module, grams: Mapping[str, Tensor]) -> None:
    """Raise an error for a Gram matrix that does not belong to a layer of `model` or is not finite."""
    layers = matrix_layers(model)
    if not grams:
        raise ValueError("no layer to measure: the mapping of Gram matrices is empty")
    for name, gram in grams.items():
        if name not in layers:
            raise ValueError(f"grams contains {name!r}, which is not a matrix layer of the network")
        d = weight_matrix(layers[name]).shape[0]
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"layer {name!r}: its Gram matrix contains NaN or infinity")
        if gram.shape != (d, d):
            raise ValueError(f"layer {name!r} has {d} input features, but its Gram matrix is {tuple(gram.shape)}")


class _Search:
    """The state of a search: the network as changed so far, how many images it gets right, the ranks found."""

    def __init__(
        self,
        network: nn.Module,
        validation: Validation,
        protocol: Protocol,
        count: int,
        evaluation: str,
        memory: int | None,
    ):
        self.network, self.layers, self.validation = network, matrix_layers(network), validation
        self.protocol, self.count = protocol, count  # how many layers are searched
        counter = counter_for(evaluation, network)
        ordered, margin, right = validation.hardest_first(network)
        own, judged = ordered.shared(), list(zip(ordered.own(margin), ordered.own(right)))
        if self.depends_on_batches(own, judged):
            counter = ExactCounter  # the fast ones rely on margins that do not depend on the batch
            self.base = ordered.count_correct(network)
        else:
            [self.base] = totals(sum(int(right.sum()) for _, right in judged))
        self.correct = self.base
        self.counter = counter(network, Replay(network, own, memory), validation.total)
        self.counter.start_from(judged)
        self.found: list[LayerRank] = []
        self.probes: list[Probe] = []
        self.precisions, self.versions = [self.counter.precision], [__version__]

    def plan(self) -> RankPlan:
        """Return the plan of the layers found so far."""
        protocol = self.protocol
        return RankPlan(
            tuple(self.found),
            protocol.tolerance if protocol.budget is None else None,
            protocol.mode,
            self.validation.total,
            self.base,
            tuple(self.probes),
            self.validation.counts,
            self.counter.evaluation,
            ", ".join(dict.fromkeys(self.precisions)),
            ", ".join(dict.fromkeys(self.versions)),
            protocol.budget,
            protocol.sides,
        )

    def depends_on_batches(self, ordered: Validation, judged: list[Judged]) -> bool:
        """Return whether predictions change with the batches that the images are in; warn if they do.

        The test runs the images that were wrong, and a tenth of all images, those with the smallest margins. It
        replaces their entries in `judged`.
        """
        left = sum(int((~right).sum()) for _, right in judged) + MIN_SHARE_RUN * sum(len(right) for _, right in judged)
        changed = 0
        with evaluating(self.network):
            for number, (images, labels) in enumerate(ordered):
                if left <= 0:
                    break
                before, judged[number] = judged[number][1], judge(self.network(images), labels)
                changed += int((judged[number][1] != before).sum())
                left -= len(labels)
        [changed] = totals(changed)
        if changed > self.rounding():
            warnings.warn(
                f"in other batches, {changed} images are classified differently: the predictions of this network "
                "depend on which images share a batch, and so will its ranks",
                stacklevel=4,
            )
        return changed > self.rounding()

    def rounding(self) -> int:
        """Return how many predictions may change by rounding alone, on another machine or in other batches."""
        return max(1, self.validation.total // 1000)

    def identity(self, grams: Mapping[str, Tensor]) -> str:
        """Return a digest of everything that decides the result, except the images.

        Gram matrices enter by their rounded traces: summed again, by other threads, their last digits differ.
        """
        traces = {name: f"{gram.trace().item():.5e}" for name, gram in grams.items()}
        own = self.protocol
        protocol: tuple = (self.plan().tolerance, own.mode, self.counter.evaluation, self.validation.counts, traces)
        if (own.budget, own.sides) != (None, "both"):  # as earlier versions wrote it otherwise
            protocol += (own.budget, own.sides)
        weights = (tensor for tensor in self.network.state_dict().values() if isinstance(tensor, Tensor))
        return tensors_digest(repr(protocol), *weights, *self.validation.labels())

    def resume(self, checkpoint: Path, identity: str, grams: Mapping[str, Tensor]) -> None:
        """Load the layers that an interrupted search found; in joint mode put their projections in place."""
        begun = read_json(checkpoint)
        if not isinstance(begun, dict) or begun.get("search") != identity:
            raise ValueError(f"{checkpoint}: of another search; delete it to start again")
        earlier = RankPlan.from_dict(begun["plan"])
        if earlier.correct is None or abs(self.base - earlier.correct) > self.rounding():
            raise ValueError(f"{checkpoint}: of a search on other images; delete it to start again")
        self.base = self.correct = earlier.correct
        self.found, self.probes = list(earlier.layers), list(earlier.probes)
        self.precisions.insert(0, earlier.precision)
        self.versions.insert(0, earlier.version)
        for entry in self.found if self.protocol.mode == "joint" else ():
            project_layer(self.layers[entry.layer], grams[entry.layer], entry.k_s, entry.k_t)
            self.correct = entry.correct or 0  # never None in a plan of a search
        self.counter.reset()

    def layer(self, name: str, gram: Tensor, bar: tqdm) -> LayerRank:
        """Search both sides of one layer. Joint mode leaves W' in the network, isolated mode restores W."""
        layer = self.layers[name]
        W = weight_matrix(layer)
        d, m = W.shape
        spectra = layer_spectra(gram, W)
        self.counter.sort_images()
        self.counter.replay.advance(layer)
        first_probe = len(self.probes)
        try:
            k_s, k_t, correct = self._sides(name, W, *spectra, bar)
        except WrongSkip:  # nothing is skipped the second time
            set_weight_matrix(layer, W)
            self.counter.reset()
            del self.probes[first_probe:]
            k_s, k_t, correct = self._sides(name, W, *spectra, bar)
        projected = project_weight(W, *spectra, k_s, k_t)
        if self.protocol.mode == "isolated":
            set_weight_matrix(layer, W)
            self.counter.reset()
        self.correct = correct
        return LayerRank(name, d, m, utilized_rank(W), k_s, k_t, utilized_rank(projected), correct)

    def _sides(self, name: str, W: Tensor, inputs: Spectrum, outputs: Spectrum, bar: tqdm) -> tuple[int, int, int]:
        """Return k_S, k_T, and how many images are correct with both projections in place."""
        sizes = dict(zip("ST", W.shape))
        found, correct = dict(sizes), self.correct if self.protocol.mode == "joint" else self.base
        for number, side in enumerate(SIDES[self.protocol.sides]):
            correct = self.counter.begin_side(correct)
            place = dict(layer=len(self.found), layers=self.count, side=number)
            needed = self.protocol.needed(self.base, correct, self.validation.total, **place)

            def project(k: int, side: str = side) -> None:
                dimensions = found | {side: k}
                set_weight_matrix(self.layers[name], project_weight(W, inputs, outputs, *dimensions.values()))

            def correct_with(k: int, side: str = side, needed: int = needed) -> int | None:
                bar.set_postfix_str(f"{name} {side} {k}/{sizes[side]}")
                project(k)
                return self.counter.count(needed)

            found[side], correct = self._bisect(name, side, sizes[side], correct, correct_with)
            project(found[side])
        return found["S"], found["T"], self.counter.finish_layer(correct)

    def _bisect(
        self, layer: str, side: str, size: int, before: int, correct_with: Callable[[int], int | None]
    ) -> tuple[int, int]:
        """Return the smallest passing k in 1..size and the number correct with it; `size` needs no probe."""
        lo, hi, correct = 1, size, before
        while lo < hi:
            k = (lo + hi) // 2
            count = correct_with(k)
            self.probes.append(Probe(layer, side, k, count is not None, count))
            if count is None:
                lo = k + 1
            else:
                hi, correct = k, count
        return lo, correct
