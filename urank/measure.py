"""Measure the utilized ranks of any image classifier in one call."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from urank.allocation import allocate_ranks, check_keep
from urank.attention import explicit_attention
from urank.baselines import output_pca
from urank.calibration import accumulate_grams, images_of
from urank.factorize import Cost, count_cost, decompose, project_network, save_compact
from urank.files import atomic, write_json
from urank.layers import count_params, coverage, matrix_layers, used_layers
from urank.numerics import describe
from urank.plan import RankPlan, allowed_loss
from urank.search.bisection import search_ranks
from urank.search.protocol import SIDES, Protocol
from urank.search.validation import Validation
from urank.shared_layers import separate_uses
from urank.throughput import images_per_second

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FACTORS = ("output", "paper")
SPEED_IMAGES = 32  # images per batch of the throughput measurement
MIN_ALLOWED_LOSS = 5  # images that one projection may lose; with fewer, chance decides too much


def measure(
    model: nn.Module,
    calibration: Iterable,
    validation: Validation | Iterable,
    tolerance: float = 0.1,
    mode: str = "joint",
    evaluation: str = "fast",
    layers: Sequence[str] = ("*",),
    memory: int | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    budget: float | None = None,
    sides: str = "both",
    keep: float | None = None,
    factors: str = "output",
) -> "Measurement":
    """Measure the utilized rank of every layer of `model`, with one projection allowed to cost `tolerance` points.

    Attention layers of `nn.MultiheadAttention` are measured as plain linear layers, and every use of a shared layer is
    measured separately.

    With `keep` there is no search: the ranks are those that keep most output energy in that share of the parameters.

    Args:
        model: an image classifier on the device where it is to run; it is not changed.
        calibration: batches of images, or of (images, labels): a list, a DataLoader, ... For the Gram matrices.
        validation: batches of (images, labels) for counting correct predictions, kept in memory; or batches of images
            alone, for which agreement with the network's own predictions is counted; or a `Validation`.
        tolerance, mode, evaluation, memory, progress, checkpoint, deadline, budget, sides: as in `search_ranks`.
        keep: largest share of the parameters of `model` that the compact network may have, 0 to 1; see
            `allocate_ranks`. It excludes budget, sides, mode and factors.
        factors: how a layer that becomes smaller is split at its rank r: "output" with the W' of rank r whose outputs
            XW' are closest to XW on the calibration images (see `output_pca`), while all other layers stay as they are;
            or "paper" with P_S W P_T, also in the layers that stay whole.
        layers: patterns of the layers to measure, for example ["blocks.*.mlp.*"].

    Raises:
        ValueError: no layer or image to measure, or an invalid option.
        FloatingPointError: the network's logits contain NaN or infinity.
        OutOfTime: the deadline is too close; the next call resumes from the checkpoint.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
        >>> images = torch.randn(100, 3) @ torch.randn(3, 16)
        >>> measured = measure(model, [images], [images], tolerance=0, progress=False)
        >>> measured.plan["0"].rank
        3
        >>> measured.decompose()[0]
        Factors(
          (0): Linear(in_features=16, out_features=3, bias=False)
          (1): Linear(in_features=3, out_features=12, bias=True)
        )
    """
    check_options(Protocol(tolerance, mode, budget, sides), keep, factors)
    device = next(model.parameters()).device
    calibration = on_device(calibration, device)
    image = images_of(first_batch(calibration))[:1]
    network = measurable(model, image)
    chosen = choose_layers(network, image, layers)
    grams = accumulate_grams(network, calibration, chosen, progress)
    counted = as_validation(network, validation)
    images, _ = next(iter(counted))
    if keep is None:
        how = (tolerance, mode, evaluation, memory, progress, checkpoint, deadline, budget, sides)
        plan = search_ranks(network, grams, counted, *how)
    else:
        share = count_params(model) / count_params(network)  # below 1 if uses of a layer were separated
        plan = allocate_ranks(network, grams, keep * share, image_shape=tuple(images.shape[1:]))
        plan = replace(plan, total=counted.total, correct=counted.count_correct(network), counts=counted.counts)
    projected = project_network(network, plan, grams)
    compact = split_network(network, plan, grams, factors)
    correct = counted.count_correct(projected), counted.count_correct(compact)
    return Measurement(network, projected, compact, plan, *correct, images[:SPEED_IMAGES], factors)


def split_network(network: nn.Module, plan: RankPlan, grams: Mapping[str, Tensor], factors: str) -> nn.Module:
    """Return the compact network: two thin layers in place of each layer of `plan` that becomes smaller."""
    if factors == "output":
        plan = output_pca(network, grams, plan.useful_part())
    return decompose(project_network(network, plan, grams), plan, useful_only=True)


def check_options(protocol: Protocol, keep: float | None, factors: str) -> None:
    """Raise a ValueError for invalid options of `measure`."""
    if factors not in FACTORS:
        raise ValueError(f"factors must be 'output' or 'paper', got {factors!r}")
    if keep is None:
        return
    check_keep(keep)
    if replace(protocol, tolerance=0.0) != Protocol(0.0) or factors != "output":
        raise ValueError("with keep there is no search: leave out budget, sides, mode and factors")


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`.

    Attributes:
        network: the measured network; `model` with explicit attention and separate uses of shared layers.
        projected: the same network with W' = P_S W P_T in place of every measured W.
        compact: the network with two thin layers in place of each layer that becomes smaller, not fine-tuned.
        plan: the utilized ranks and how they were found.
        projected_correct, compact_correct: how many validation images these networks classify correctly.
        images: a batch of validation images, for the cost and the throughput.
        factors: how the layers of `compact` were split, as in `measure`.
    """

    network: nn.Module
    projected: nn.Module
    compact: nn.Module
    plan: RankPlan
    projected_correct: int
    compact_correct: int
    images: Tensor
    factors: str

    @property
    def frame(self) -> "pd.DataFrame":
        """One row per layer: d, m, rank of W, k_S, k_T, utilized rank, utilization."""
        return self.plan.to_frame()

    @property
    def accuracy(self) -> tuple[float, float, float]:
        """Accuracy on the validation images in percent: of the network, projected, and compact; not fine-tuned."""
        assert self.plan.correct is not None
        counts = self.plan.correct, self.projected_correct, self.compact_correct
        first, second, third = (100 * count / self.plan.total for count in counts)
        return first, second, third

    def decompose(self) -> nn.Module:
        """Return the compact network, ready for fine-tuning."""
        return self.compact

    @cached_property
    def costs(self) -> tuple[Cost, Cost]:
        """Parameters, and MACs per image, of the network and of the compact network."""
        shape = tuple(self.images.shape[1:])
        return count_cost(self.network, shape), count_cost(self.compact, shape)

    @cached_property
    def throughput(self) -> tuple[float, float]:
        """Images/s of the network and of the compact network on this device, in batches of up to 32 images."""
        speeds = images_per_second(dict(network=self.network, compact=self.compact), self.images, seconds=2)
        return speeds["network"], speeds["compact"]

    @cached_property
    def coverage(self) -> "pd.DataFrame":
        """Which modules were measured, their share of the parameters, and why others were skipped (see `coverage`)."""
        frame = coverage(self.network, self.images[:1])
        left_out = frame["measured"] & ~frame["layer"].isin([entry.layer for entry in self.plan.layers])
        reason = frame["reason"].mask(left_out, "not among the chosen layers")
        return frame.assign(measured=frame["measured"] & ~left_out, reason=reason)

    def note(self) -> str:
        """Return a warning if the tolerance allows a projection to lose only a few images, else ""."""
        return few_images_note(self.plan.tolerance, self.plan.total)

    def figure(self, title: str = "") -> "Figure":
        """Draw the utilization snapshot: the rank of W and the utilized rank of every layer."""
        from urank.report import snapshot  # imports matplotlib

        return snapshot(self.plan, title)

    def report(self, path: Path | str, title: str = "Utilized rank") -> None:
        """Write a page of HTML with the summary, the snapshot and the table of layers. It opens offline."""
        from urank.report import html

        with atomic(Path(path)) as temporary:
            temporary.write_text(html(self, title), encoding="utf-8")

    @property
    def results(self) -> dict[str, Any]:
        """The main numbers as plain data: before and after; accuracy (also projected) in percent, MLU from 0 to 1."""
        (before, after), plan = self.costs, self.plan
        return dict(
            layers=len(plan.layers),
            share=self.coverage_share(),
            images=plan.total,
            counts=plan.counts,
            tolerance=plan.tolerance,
            budget=plan.budget,
            sides=plan.sides,
            mode=plan.mode,
            factors=self.factors,
            accuracy=self.accuracy,
            mlu=(plan.weight_mlu, plan.mlu),
            params=(before.params, after.params),
            macs=(before.macs, after.macs),
            images_per_second=self.throughput,
            probes=len(plan.probes),
            evaluation=plan.evaluation,
            precision=plan.precision,
            device=describe(self.images.device),
            versions=dict(urank=plan.version, torch=torch.__version__),
        )

    def save(self, folder: Path | str, title: str = "Utilized rank") -> None:
        """Write plan.json, results.json, layers.csv, snapshot.svg, snapshot.png and report.html into `folder`."""
        folder, figure = Path(folder), self.figure(title)
        self.plan.save(folder / "plan.json")
        write_json(folder / "results.json", self.results)
        with atomic(folder / "layers.csv") as path:
            self.frame.to_csv(path, index=False)
        for kind in ("svg", "png"):
            with atomic(folder / f"snapshot.{kind}") as path:
                figure.savefig(path, format=kind, dpi=160)
        self.report(folder / "report.html", title)

    def save_compact(self, folder: Path | str) -> None:
        """Write the compact network into `folder`; `load_compact(network, folder)` reads it."""
        save_compact(self.compact, self.plan, folder)

    def summary(self) -> str:
        """Return the main results as text, one per line."""
        r, (first, second) = self.results, self.throughput
        counts = "agreement with the unmodified network" if r["counts"] == "agreement" else "correct labels"
        found = f"{r['probes']} probes, {r['evaluation']}, images in {r['precision']}" if r["probes"] else "no search"
        rows = {
            "layers": f"{r['layers']}, with {100 * r['share']:.1f} % of the parameters",
            "accuracy": "{:.2f} % -> {:.2f} % projected, {:.2f} % compact, not fine-tuned ".format(*r["accuracy"])
            + f"({counts}, {r['images']:,} images)",
            "MLU of W": f"{100 * r['mlu'][0]:.1f} %",
            "MLU": f"{100 * r['mlu'][1]:.1f} %",
            "parameters": change(r["params"][0] / 1e6, r["params"][1] / 1e6, " M"),
            "MACs": change(r["macs"][0] / 1e6, r["macs"][1] / 1e6, " M"),
            "images/s": change(first, second, ""),
            "ranks": f"{self.rule()}; {found}",
        }
        lines = [f"{name:<11} {text}" for name, text in rows.items()]
        if second < first:
            lines.append("The compact network is slower than the original on this device.")
        return "\n".join([*lines, *filter(None, [self.note()])])

    def rule(self) -> str:
        """Return in words how the ranks were chosen."""
        plan = self.plan
        limits = {"per projection": plan.tolerance, "in all": plan.budget}
        limit = next((f"{points:g} points {words}" for words, points in limits.items() if points is not None), None)
        sides = "" if plan.sides == "both" else f", {plan.sides} side only"
        return f"{plan.mode}, {limit}{sides}" if limit else plan.mode

    def coverage_share(self) -> float:
        """Return the share of the parameters that the measured layers have, 0 to 1."""
        frame = self.coverage
        return float(frame.loc[frame["measured"], "share"].sum())


def change(before: float, after: float, unit: str) -> str:
    """Format two numbers and their ratio.

    >>> change(2.5, 0.5, " M"), change(17490.0, 8745.0, "")
    ('2.5 M -> 0.5 M (x 0.20)', '17,490 -> 8,745 (x 0.50)')
    """
    shown = [f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in (before, after)]
    return f"{shown[0]}{unit} -> {shown[1]}{unit} (x {after / before:.2f})"


def few_images_note(tolerance: float | None, total: int) -> str:
    """Return a warning if one projection may lose fewer than five of `total` images, else "".

    >>> few_images_note(0.1, 50_000)
    ''
    """
    if not tolerance or (allowed := allowed_loss(tolerance, total)) >= MIN_ALLOWED_LOSS:
        return ""
    recommended = math.ceil(100 * MIN_ALLOWED_LOSS / tolerance)
    return (
        f"Note: at a tolerance of {tolerance:g}, one projection may lose {allowed} of {total:,} images. So few "
        f"images leave the ranks uncertain. Use at least {recommended:,} validation images, or a larger tolerance."
    )


def measurable(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model` in evaluation mode whose attention and shared layers are separate matrix layers."""
    return separate_uses(explicit_attention(model), images).eval()


def choose_layers(network: nn.Module, images: Tensor, patterns: Sequence[str]) -> list[str]:
    """Return the layers that a forward pass uses and whose names match a pattern, in forward order.

    Raises:
        ValueError: none matches.
    """
    used = used_layers(network, images)
    chosen = [name for name in used if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"no layer matches {', '.join(map(repr, patterns))} (layers: {', '.join(used)})")
    return chosen


def count_probes(network: nn.Module, names: Iterable[str], sides: str = "both") -> int:
    """Return how many probes a search needs at most: ceil(log2 d), ceil(log2 m) or their sum per layer."""
    layers = matrix_layers(network)
    weights = [layers[name].weight for name in names]
    sizes = [dict(S=weight[0].numel(), T=len(weight))[side] for weight in weights for side in SIDES[sides]]
    return sum(math.ceil(math.log2(size)) for size in sizes)


def as_validation(network: nn.Module, batches: Validation | Iterable) -> Validation:
    """Return a `Validation` over labelled batches, or one of agreement over batches of images alone."""
    if isinstance(batches, Validation):
        return batches
    moved = on_device(batches, next(network.parameters()).device)
    unlabelled = isinstance(first_batch(moved), Tensor)
    return Validation.agreement(network, moved) if unlabelled else Validation(moved)


def on_device(batches: Iterable, device: torch.device) -> Iterable:
    """Return batches on `device` that can be iterated repeatedly.

    The batches of a data set remain such, so that `Validation` can keep many images as bytes or files.
    """
    if hasattr(batches, "to"):
        return batches.to(device)
    return Moved(list(batches) if isinstance(batches, Iterator) else batches, device)


def first_batch(batches: Iterable) -> Any:
    """Return the first batch; raise ValueError if there is none."""
    for batch in batches:
        return batch
    raise ValueError("there is no batch of images")


@dataclass(frozen=True)
class Moved:
    """Batches of images, or of (images, labels), that are moved to a device when they are needed."""

    batches: Iterable
    device: torch.device

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            if isinstance(batch, Tensor):
                yield batch.to(self.device)
            else:
                yield tuple(part.to(self.device) for part in batch)
