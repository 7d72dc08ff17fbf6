"""The smallest (k_S, k_T) that a tolerance allows, found layer by layer by bisection (sections 2.2 and 5.3).

The paper leaves the protocol open. Here layers come in the order of the forward pass; each is searched on its input
side first and then, with that projection in place, on its output side. A probe puts W' = P_S W P_T into the network
and passes when enough validation images are still classified correctly.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from urank.deadline import check_time
from urank.distributed import totals
from urank.factorize import project_layer
from urank.files import read_json, tensors_digest, write_json
from urank.layers import evaluating, matrix_layers, set_weight_matrix, weight_matrix
from urank.plan import LayerRank, Probe, RankPlan, allowed_loss
from urank.search.probes import (
    APPROXIMATIONS,
    LEAST,
    Exact,
    Judged,
    Near,
    Sequential,
    WrongPresumption,
    choose_counter,
    judge,
)
from urank.search.replay import Replay
from urank.search.validation import Validation
from urank.subspaces import Spectrum, dimension_for_energy, layer_spectra, project_weight, utilized_rank


def search_ranks(
    model: nn.Module,
    grams: Mapping[str, Tensor],
    validation: Validation | Iterable[tuple[Tensor, Tensor]],
    tolerance: float = 0.1,
    mode: str = "joint",
    evaluation: str = "auto",
    warm_start: bool = False,
    memory: int | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
    deadline: float | None = None,
) -> RankPlan:
    """The utilized rank of every layer in `grams`, in their order, under an accuracy tolerance.

    Each side of a layer is bisected over its dimensions: k passes when at least `reference - floor(tolerance N / 100)`
    of the N validation images are classified correctly; no k but the full dimension passing means no projection.

    Args:
        model: is left as it is.
        grams: X^T X of the unmodified network's layers, from `accumulate_grams`.
        validation: a `Validation`, or a re-iterable of (images, labels), on the model's device.
        tolerance: epsilon, in accuracy points that one projection may cost.
        mode: "joint" leaves what was found in place, and each projection is compared with the network just before
            it, so that at most 2 L epsilon points are lost over L layers. "isolated" searches each layer in the
            otherwise unmodified network, whose accuracy its input side may miss by epsilon, both sides by 2 epsilon.
        evaluation: how a probe is decided (see `counting`). "exact" runs every image until a failure is certain. "near"
            gives its plan unless a probe, and not the last that passes in its layer, takes far more from an image's
            margin than it was seen to take from a tenth of them; "screened", which does this in bfloat16, unless that
            happens or bfloat16 moves a margin by far more than was seen. "auto" is "screened" for a float32 network
            where the device multiplies bfloat16 faster than float32, else "near". "bfloat16" and "sequential" are
            approximations.
        warm_start: begin each bisection at the spectral energy that the layer before kept on the same side: an
            approximation, as the accuracy need not be monotone in k.
        memory: bytes of activations that may be kept between probes; default as `Replay`'s.
        checkpoint: file that is rewritten after every layer with the plan of those found, from which an interrupted
            search goes on. A warm start begins anew there.
        deadline: value of `time.monotonic()` by which to stop: but for the first of this call, no layer begins that
            would not end before it if it took as long as the last.

    Raises:
        ValueError: tolerance outside 0..100, another mode or evaluation, no validation image, a Gram matrix of an
            unknown layer or of the wrong shape, labels that the network has no output for, or a checkpoint of another
            search.
        FloatingPointError: the network's logits or a Gram matrix hold NaN or infinity.
        OutOfTime: the deadline is too near for the layers that are left.
    """
    check_protocol(tolerance, mode)
    network = copy.deepcopy(model)
    check_grams(network, grams)
    if not isinstance(validation, Validation):
        validation = Validation(validation)
    search = _Search(network, validation, tolerance, mode, evaluation, warm_start, memory)
    identity = "" if checkpoint is None else search.identity(grams)
    if checkpoint is not None and checkpoint.exists():
        search.resume(checkpoint, identity, grams)
    left = list(grams)[len(search.found) :]
    bar = tqdm(left, "rank search", len(grams), initial=len(search.found), unit="layer", disable=not progress)
    with evaluating(network), bar:
        for number, name in enumerate(bar, 1):
            start = time.monotonic()
            search.found.append(search.layer(name, grams[name], bar))
            if checkpoint is not None:
                write_json(checkpoint, dict(search=identity, plan=search.plan().to_dict()))
            if number < len(left):
                remaining = f"the rank search has {len(left) - number} of {len(grams)} layers left"
                check_time(deadline, remaining, time.monotonic() - start)
    return search.plan()


def check_protocol(tolerance: float, mode: str) -> None:
    if not 0 <= tolerance <= 100:
        raise ValueError(f"the tolerance is in accuracy points from 0 to 100, got {tolerance}")
    if mode not in ("joint", "isolated"):
        raise ValueError(f"the search mode is 'joint' or 'isolated', got {mode!r}")


def check_grams(model: nn.Module, grams: Mapping[str, Tensor]) -> None:
    layers = matrix_layers(model)
    if not grams:
        raise ValueError("no layer to measure: the mapping of Gram matrices is empty")
    for name, gram in grams.items():
        if name not in layers:
            raise ValueError(f"a Gram matrix is given for {name!r}, which is no matrix layer of the network")
        d = weight_matrix(layers[name]).shape[0]
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"layer {name!r}: its Gram matrix holds NaN or infinity")
        if gram.shape != (d, d):
            raise ValueError(f"layer {name!r} has {d} input features, its Gram matrix has shape {tuple(gram.shape)}")


class _Search:
    """A search under way: the network as changed so far, what it gets right, and what was found."""

    def __init__(
        self,
        network: nn.Module,
        validation: Validation,
        tolerance: float,
        mode: str,
        evaluation: str,
        warm_start: bool,
        memory: int | None,
    ):
        self.network, self.layers = network, matrix_layers(network)
        self.mode, self.warm_start = mode, warm_start
        self.validation, self.tolerance = validation, float(tolerance)
        counter = choose_counter(evaluation, network)
        ordered, margin, right = validation.hardest_first(network)
        own, judged = ordered.shared(), list(zip(ordered.own(margin), ordered.own(right)))
        if self.depends_on_batches(own, judged):
            counter = Exact if issubclass(counter, Near) else counter  # these presume that it does not
            self.base = ordered.count_correct(network)
        else:
            [self.base] = totals(sum(int(right.sum()) for _, right in judged))
        self.correct = self.base
        self.replay = Replay(network, validation.shuffled().shared() if counter is Sequential else own, memory)
        self.counter = counter(network, self.replay, validation.total)
        self.counter.know(judged)
        self.allowed = allowed_loss(tolerance, validation.total)
        self.found: list[LayerRank] = []
        self.probes: list[Probe] = []
        self.kept: dict[str, float] = {}  # side -> the spectral energy that the last layer kept

    def plan(self) -> RankPlan:
        """Of the layers found so far."""
        layers, probes, validation = tuple(self.found), tuple(self.probes), self.validation
        return RankPlan(layers, self.tolerance, self.mode, validation.total, self.base, probes, validation.counts)

    def depends_on_batches(self, ordered: Validation, judged: list[Judged]) -> bool:
        """Whether the network answers otherwise in the batches of `ordered` than it did; a warning if so.

        Asked are the images that were wrong and then a tenth of all, right by the smallest margins. What they are
        answered now replaces what was `judged`.
        """
        left = sum(int((~right).sum()) for _, right in judged) + LEAST * sum(len(right) for _, right in judged)
        otherwise = 0
        with evaluating(self.network):
            for number, (images, labels) in enumerate(ordered):
                if left <= 0:
                    break
                before, judged[number] = judged[number][1], judge(self.network(images), labels)
                otherwise += int((judged[number][1] != before).sum())
                left -= len(labels)
        [otherwise] = totals(otherwise)
        if otherwise > self.rounding():
            warnings.warn(
                f"{otherwise} of the images that are wrong or nearly so are answered otherwise in other batches: what "
                "this network answers depends on which images share a batch, and so will its ranks",
                stacklevel=4,
            )
        return otherwise > self.rounding()

    def rounding(self) -> int:
        """How many images may be answered otherwise by the same network on another machine, or in other batches."""
        return max(1, self.validation.total // 1000)

    def identity(self, grams: Mapping[str, Tensor]) -> str:
        """Hexadecimal digits that change with what decides what is found, the images apart.

        A Gram matrix that was summed again, by other threads say, differs in its last digits: its rounded trace counts.
        """
        counter = type(self.counter).__name__ if isinstance(self.counter, APPROXIMATIONS) else "exact"
        traces = {name: f"{gram.trace().item():.5e}" for name, gram in grams.items()}
        protocol = (self.tolerance, self.mode, counter, self.warm_start, self.validation.counts, traces)
        weights = (tensor for tensor in self.network.state_dict().values() if isinstance(tensor, Tensor))
        return tensors_digest(repr(protocol), *weights, *self.validation.labels())

    def resume(self, checkpoint: Path, identity: str, grams: Mapping[str, Tensor]) -> None:
        """Take over what an interrupted search found; in joint mode its projections are put in place."""
        begun = read_json(checkpoint)
        if not isinstance(begun, dict) or begun.get("search") != identity:
            raise ValueError(f"{checkpoint}: of another search; delete it to start again")
        earlier = RankPlan.from_dict(begun["plan"])
        if abs(self.base - earlier.correct) > self.rounding():
            raise ValueError(f"{checkpoint}: of a search on other images; delete it to start again")
        self.base = self.correct = earlier.correct
        self.found, self.probes = list(earlier.layers), list(earlier.probes)
        for entry in self.found if self.mode == "joint" else ():
            project_layer(self.layers[entry.layer], grams[entry.layer], entry.k_s, entry.k_t)
            self.correct = entry.correct
        self.counter.forget()

    def layer(self, name: str, gram: Tensor, bar: tqdm) -> LayerRank:
        """Both sides of one layer. In joint mode W' stays in the network, in isolated mode W comes back."""
        layer = self.layers[name]
        W = weight_matrix(layer)
        spectra = layer_spectra(gram, W)
        self.counter.sort()
        self.replay.advance(layer)
        asked, kept = len(self.probes), dict(self.kept)
        try:
            k_s, k_t, correct = self._sides(name, W, *spectra, bar)
        except WrongPresumption:  # there is none the second time
            set_weight_matrix(layer, W)
            self.counter.forget()
            self.kept = kept
            del self.probes[asked:]
            k_s, k_t, correct = self._sides(name, W, *spectra, bar)
        projected = project_weight(W, *spectra, k_s, k_t)
        if self.mode == "isolated":
            set_weight_matrix(layer, W)
            self.counter.forget()
        self.correct = correct
        return LayerRank(name, *W.shape, utilized_rank(W), k_s, k_t, utilized_rank(projected), correct)

    def _sides(self, name: str, W: Tensor, inputs: Spectrum, outputs: Spectrum, bar: tqdm) -> tuple[int, int, int]:
        """k_S, k_T, and how many images are right with both in place."""
        m = W.shape[1]

        def side(label: str, spectrum: Spectrum, before: int, needed: int, project: Callable[[int], Tensor]):
            def correct_with(k: int) -> int | None:
                bar.set_postfix_str(f"{name} {label} {k}/{len(spectrum.energy)}")
                set_weight_matrix(self.layers[name], project(k))
                return self.counter.count(needed)

            k, correct = self._bisect(name, label, spectrum, before, correct_with)
            set_weight_matrix(self.layers[name], project(k))
            return k, correct

        before = self.counter.prepare(self.correct if self.mode == "joint" else self.base)
        needed = before - self.allowed
        k_s, correct = side("S", inputs, before, needed, lambda k: project_weight(W, inputs, outputs, k, m))
        correct = self.counter.prepare(correct)
        needed = correct - self.allowed if self.mode == "joint" else self.base - 2 * self.allowed
        k_t, correct = side("T", outputs, correct, needed, lambda k: project_weight(W, inputs, outputs, k_s, k))
        return k_s, k_t, self.counter.confirm(correct)

    def _bisect(self, layer: str, side: str, spectrum: Spectrum, before: int, correct_with) -> tuple[int, int]:
        """The smallest passing k in 1..size and the number correct with it; `size` itself is never asked."""
        lo, hi, correct = 1, len(spectrum.energy), before
        step = max(1, hi // 64)  # of a warm start: how far the next probe is, twice as far each time
        k = dimension_for_energy(spectrum, self.kept[side]) if side in self.kept else (lo + hi) // 2
        k = min(k, hi - 1)
        while lo < hi:
            count = correct_with(k)
            self.probes.append(Probe(layer, side, k, count is not None, count))
            if count is None:
                lo, nearby = k + 1, k + step
            else:
                hi, correct, nearby = k, count, k - step
            k, step = nearby if side in self.kept and lo <= nearby < hi else (lo + hi) // 2, 2 * step
        if self.warm_start:
            self.kept[side] = (1 - 1e-9) * spectrum.energy[lo - 1].item()  # less what rounding may take from it
        return lo, correct
