"""The outcome of a measurement as plain data: no tensors, JSON on disk, a DataFrame in a notebook."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import get_args, get_origin

import pandas as pd

from urank.files import read_json, write_json
from urank.subspaces import mean_layer_utilization, utilization

COLUMNS = ["layer", "d", "m", "weight_rank", "k_s", "k_t", "rank", "utilization", "correct"]
COUNTS = ("labels", "agreement")  # what a correct image agrees with: its label, or the unmodified network's answer


@dataclass(frozen=True)
class Probe:
    """One question of the search: with dimension `k` on side "S" or "T" of `layer`, is the tolerance kept?

    `correct` is the number of validation images classified correctly; None where a probe was ended as soon as its
    failure was certain, and the least that passes where a sequential test accepted it unseen.
    """

    layer: str
    side: str
    k: int
    passed: bool
    correct: int | None


@dataclass(frozen=True)
class LayerRank:
    """One layer's outcome: W is d x m, S and T have k_s and k_t dimensions, W' has utilized rank `rank`.

    `weight_rank` is the same count for the unaltered W. `correct` is the number of validation images classified
    correctly with this layer's projections in place (in joint mode also those of the layers searched before it); None
    where no accuracy was consulted.
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
        """rank / min(d, m), between 0 and 1."""
        return utilization(self.rank, self.d, self.m)

    @property
    def useful(self) -> bool:
        """True where two thin factors, of rank 1 at least, hold fewer weights than W: r (d + m) < d m (section 2.3)."""
        return max(1, self.rank) * (self.d + self.m) < self.d * self.m


@dataclass(frozen=True)
class RankPlan:
    """Utilized ranks of a network's layers, in the order of the forward pass.

    Attributes:
        layers: one `LayerRank` a layer.
        tolerance: accuracy points that one projection may cost; None where no accuracy was consulted.
        mode: "joint" or "isolated" (see `search_ranks`), or the name of the rule that chose the ranks.
        total: number of validation images; 0 where none were used.
        correct: of these, how many the unmodified network classifies correctly; None where none were used.
        probes: every question the search asked, in order.
        counts: what a correct image is: "labels", one whose label is predicted, or "agreement", one whose prediction
            is the unmodified network's (see `Validation.agreement`).
    """

    layers: tuple[LayerRank, ...]
    tolerance: float | None
    mode: str
    total: int
    correct: int | None
    probes: tuple[Probe, ...] = field(default=(), repr=False)
    counts: str = "labels"

    @property
    def mlu(self) -> float:
        """Mean layer utilization, between 0 and 1; a ValueError for a plan of no layer."""
        return mean_layer_utilization(layer.utilization for layer in self.layers)

    @property
    def weight_mlu(self) -> float:
        """The same mean with the rank of the unaltered W: the paper's "original MLU", between 0 and 1."""
        return mean_layer_utilization(utilization(layer.weight_rank, layer.d, layer.m) for layer in self.layers)

    @property
    def least_correct(self) -> int:
        """How many images must be classified correctly for one projection of the unmodified network to pass."""
        return self.correct - allowed_loss(self.tolerance, self.total)

    def __getitem__(self, layer: str) -> LayerRank:
        return {entry.layer: entry for entry in self.layers}[layer]

    def in_order(self, names: Iterable[str]) -> "RankPlan":
        """The same plan with its layers in the order of `names`, which has them all."""
        return replace(self, layers=tuple(self[name] for name in names))

    def to_frame(self) -> pd.DataFrame:
        """One row a layer with the columns of `COLUMNS` (`correct` missing where no accuracy was consulted)."""
        rows = [asdict(layer) | dict(utilization=layer.utilization) for layer in self.layers]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"correct": "Int64"})

    def probes_frame(self) -> pd.DataFrame:
        """One row a probe: layer, side, k, passed, correct (missing where the probe was ended early)."""
        frame = pd.DataFrame([asdict(probe) for probe in self.probes], columns=[f.name for f in fields(Probe)])
        return frame.astype({"correct": "Int64"})

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> "RankPlan":
        """The plan that `to_dict` wrote down.

        Raises:
            KeyError, TypeError, ValueError: a missing or unknown key, a value of the wrong type, another `counts`.
        """
        layers = tuple(typed(LayerRank(**layer)) for layer in content["layers"])
        probes = tuple(typed(Probe(**probe)) for probe in content["probes"])
        plan = typed(cls(**content | dict(layers=layers, probes=probes)))
        if plan.counts not in COUNTS:
            raise ValueError(f"counts is 'labels' or 'agreement', got {plan.counts!r}")
        return plan

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "RankPlan":
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file is cut off or is no rank plan; the message names it and says why.
        """
        content = read_json(Path(path))
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a rank plan ({error})") from error


def allowed_loss(tolerance: float, total: int) -> int:
    """floor(tolerance total / 100) images, for the decimal number that was written (0.29 of 10,000 is 29)."""
    return math.floor(Fraction(str(tolerance)) * total / 100)


def typed(entry):
    """`entry`, a dataclass instance, if every plain value in it has its field's type; otherwise a TypeError.

    An int passes for a float, a bool for nothing but a bool.
    """
    for entry_field in fields(entry):
        value, kind = getattr(entry, entry_field.name), entry_field.type
        if get_origin(kind) is tuple:  # of entries, each checked by itself
            continue
        allowed = get_args(kind) or (kind,)
        if type(value) not in allowed and not (float in allowed and type(value) is int):
            name = getattr(kind, "__name__", kind)
            raise TypeError(f"{type(entry).__name__}: {entry_field.name} must be {name}, got {value!r}")
    return entry
