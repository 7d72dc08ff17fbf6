"""How much accuracy each projection of a search may cost."""

from dataclasses import dataclass
from fractions import Fraction

from urank.plan import allowed_loss

SIDES = dict(both="ST", input="S", output="T")  # the projections of a layer, in the order in which they are searched


@dataclass(frozen=True)
class Protocol:
    """The options of `search_ranks` that decide which dimensions pass.

    Attributes:
        tolerance, mode, budget, sides: as in `search_ranks`.

    Raises:
        ValueError: tolerance or budget outside 0..100, an unknown mode or unknown sides, or a budget in isolated mode.
    """

    tolerance: float = 0.1
    mode: str = "joint"
    budget: float | None = None
    sides: str = "both"

    def __post_init__(self) -> None:
        for name in ("tolerance", "budget"):
            points = getattr(self, name)
            if points is None and name == "budget":
                continue
            if not 0 <= points <= 100:
                raise ValueError(f"{name} must be between 0 and 100 accuracy points, got {points}")
            object.__setattr__(self, name, float(points))
        if self.mode not in ("joint", "isolated"):
            raise ValueError(f"mode must be 'joint' or 'isolated', got {self.mode!r}")
        if self.budget is not None and self.mode != "joint":
            raise ValueError("a budget needs mode 'joint': isolated layers are never projected together")
        check_sides(self.sides)

    def needed(self, base: int, correct: int, total: int, layer: int, layers: int, side: int) -> int:
        """Return how many of `total` images must be correct for a projection to pass.

        Args:
            base: how many the unmodified network classifies correctly.
            correct: how many are correct just before this projection.
            layer: number of the searched layer, from 0, of `layers`.
            side: number of the projection in this layer, from 0.

        >>> Protocol(tolerance=1).needed(base=95, correct=90, total=100, layer=1, layers=3, side=1)
        89
        >>> Protocol(budget=6).needed(base=95, correct=90, total=100, layer=1, layers=3, side=1)  # 4 of 6 projections
        91
        """
        if self.budget is not None:
            per_layer = len(SIDES[self.sides])
            used = Fraction(layer * per_layer + side + 1, layers * per_layer)
            return base - allowed_loss(self.budget, total, used)
        allowed = allowed_loss(self.tolerance, total)
        return correct - allowed if self.mode == "joint" else base - (side + 1) * allowed


def check_sides(sides: str) -> None:
    """Raise a ValueError for unknown sides."""
    if sides not in SIDES:
        raise ValueError(f"sides must be one of {', '.join(map(repr, SIDES))}, got {sides!r}")
