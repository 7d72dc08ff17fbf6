"""Rank plans: the result of a search as plain data, without tensors, that saves as JSON and shows as a DataFrame."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin

from urank._version import __version__
from urank.files import read_json, write_json
from urank.subspaces import mean_layer_utilization, utilization

if TYPE_CHECKING:
    import pandas as pd

Entry = TypeVar("Entry", bound="LayerRank | Probe | RankPlan")

COLUMNS = ["layer", "d", "m", "weight_rank", "k_s", "k_t", "rank", "utilization", "correct"]
COUNTS = ("labels", "agreement")  # what a correct prediction agrees with: the label, or the unmodified network
HOW = ("evaluation", "precision", "version")  # fields that plans of early versions do not have
LATER = dict(budget=None, sides="both")  # fields that older versions cannot read; saved only if they differ
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Probe:
    """One question of the search: with dimension `k` on side "S" or "T" of `layer`, is the tolerance kept?

    Attributes:
        layer, side, k: the projection that was tried.
        passed: whether enough validation images were classified correctly.
        correct: how many were classified correctly; None if the probe failed, because it stops as soon as failure is
            certain. With `evaluation="fast"` this is an upper bound: skipped images count as correct. The count of
            the whole layer, `LayerRank.correct`, is counted over every image.
    """

    layer: str
    side: str
    k: int
    passed: bool
    correct: int | None


@dataclass(frozen=True)
class LayerRank:
    """The utilized rank of one layer.

    Attributes:
        layer: path of the layer in the network.
        d, m: input and output features; W is d x m.
        weight_rank: utilized rank of the unmodified W.
        k_s, k_t: dimensions of the input subspace S and the output subspace T.
        rank: utilized rank of W' = P_S W P_T.
        correct: validation images classified correctly with W' in place, in joint mode together with the layers
            searched before; None if the ranks were chosen without validation images.
    """

    layer: str
    d: int
    m: int
    weight_rank: int
    k_s: int
    k_t: int
    rank: int
    correct: int | None

    @property
    def utilization(self) -> float:
        """Return rank / min(d, m), between 0 and 1."""
        return utilization(self.rank, self.d, self.m)

    @property
    def useful(self) -> bool:
        """Return whether two thin factors have fewer weights than W: r (d + m) < d m, with r >= 1 (section 2.3)."""
        return max(1, self.rank) * (self.d + self.m) < self.d * self.m


@dataclass(frozen=True)
class RankPlan:
    """Utilized ranks of a network's layers, in the order of the forward pass, and how they were found.

    Attributes:
        layers: one `LayerRank` per layer.
        tolerance: accuracy points that one projection may cost; None if there was a budget, or no validation image.
        mode: "joint" or "isolated" (see `search_ranks`), or the name of the rule that chose the ranks.
        total: number of validation images; 0 if none were used.
        correct: how many of them the unmodified network classifies correctly; None if none were used.
        probes: every question the search asked, in order.
        counts: when an image counts as correct: "labels", if its label is predicted, or "agreement", if the prediction
            is the unmodified network's (see `Validation.agreement`).
        evaluation: how probes were decided: "exact" or "fast" (see `search_ranks`), or "none" if there were no probes.
        precision: number format in which validation images were run, for example "float32". "bfloat16" means that
            uncertain images were repeated in the network's own precision.
        version: version of urank that ran the search.
        budget: accuracy points that all projections together may cost; None if each one had a tolerance.
        sides: which sides were projected: "both", "input" or "output".

    `evaluation`, `precision` and `version` are "not recorded" in a plan that was saved before urank kept them.

    Example:
        >>> plan = RankPlan((LayerRank("fc", 8, 4, 4, 3, 2, 2, None),), None, "energy", 0, None)
        >>> plan.mlu
        0.5
    """

    layers: tuple[LayerRank, ...]
    tolerance: float | None
    mode: str
    total: int
    correct: int | None
    probes: tuple[Probe, ...] = field(default=(), repr=False)
    counts: str = "labels"
    evaluation: str = "none"
    precision: str = "none"
    version: str = __version__
    budget: float | None = None
    sides: str = "both"

    @property
    def mlu(self) -> float:
        """Return the mean layer utilization, between 0 and 1; raise a ValueError if the plan has no layer."""
        return mean_layer_utilization(layer.utilization for layer in self.layers)

    @property
    def weight_mlu(self) -> float:
        """Return the same mean for the unmodified W, the paper's "original MLU", between 0 and 1."""
        return mean_layer_utilization(utilization(layer.weight_rank, layer.d, layer.m) for layer in self.layers)

    @property
    def least_correct(self) -> int:
        """Return how many images must be correct for the first projection of the unmodified network to pass."""
        if self.correct is None or self.tolerance is None:
            raise ValueError(f"this plan has no tolerance for one projection (mode {self.mode!r})")
        return self.correct - allowed_loss(self.tolerance, self.total)

    def __getitem__(self, layer: str) -> LayerRank:
        return {entry.layer: entry for entry in self.layers}[layer]

    def useful_part(self) -> "RankPlan":
        """Return the plan of those layers alone that become smaller when they are split."""
        return replace(self, layers=tuple(entry for entry in self.layers if entry.useful))

    def in_order(self, names: Iterable[str]) -> "RankPlan":
        """Return the plan with its layers in the order of `names`, which must contain all of them."""
        return replace(self, layers=tuple(self[name] for name in names))

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per layer with the columns of `COLUMNS`; `correct` is missing without validation images."""
        import pandas as pd  # slow to import, and only needed for tables

        rows = [asdict(layer) | dict(utilization=layer.utilization) for layer in self.layers]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"correct": "Int64"})

    def probes_frame(self) -> "pd.DataFrame":
        """Return one row per probe: layer, side, k, passed, correct (missing if the probe failed)."""
        import pandas as pd  # as in `to_frame`

        frame = pd.DataFrame([asdict(probe) for probe in self.probes], columns=[f.name for f in fields(Probe)])
        return frame.astype({"correct": "Int64"})

    def to_dict(self) -> dict:
        """Return the plan as plain data, without `budget` and `sides` where these are the defaults."""
        return {name: value for name, value in asdict(self).items() if value != LATER.get(name, ...)}

    @classmethod
    def from_dict(cls, content: dict) -> "RankPlan":
        """Return the plan from the output of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: a missing or unknown key, a value of the wrong type, or unknown `counts`.
        """
        layers = tuple(typed(LayerRank(**layer)) for layer in content["layers"])
        probes = tuple(typed(Probe(**probe)) for probe in content["probes"])
        plan = typed(cls(**dict.fromkeys(HOW, NOT_RECORDED) | content | dict(layers=layers, probes=probes)))
        if plan.counts not in COUNTS:
            raise ValueError(f"counts must be 'labels' or 'agreement', got {plan.counts!r}")
        return plan

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "RankPlan":
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file is truncated or not a rank plan; the message names the file and the reason.
        """
        content = read_json(Path(path))
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a rank plan ({error})") from error


def allowed_loss(tolerance: float, total: int, share: Fraction = Fraction(1)) -> int:
    """Return floor(share tolerance total / 100) images in decimal arithmetic, so that 0.29 % of 10,000 is 29."""
    return math.floor(share * Fraction(str(tolerance)) * total / 100)


def typed(entry: Entry) -> Entry:
    """Return `entry`, a dataclass instance, if every plain value has its field's type; raise a TypeError otherwise.

    An int is accepted as a float; a bool only as a bool.
    """
    for entry_field in fields(entry):
        value, kind = getattr(entry, entry_field.name), entry_field.type
        if get_origin(kind) is tuple:  # its entries are checked separately
            continue
        allowed = get_args(kind) or (kind,)
        if type(value) not in allowed and not (float in allowed and type(value) is int):
            name = getattr(kind, "__name__", kind)
            raise TypeError(f"{type(entry).__name__}: {entry_field.name} must be {name}, got {value!r}")
    return entry
