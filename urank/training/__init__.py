"""Train and fine-tune networks with a `Recipe` and `fit`."""

from urank.training.fitting import fit
from urank.training.recipe import Recipe

__all__ = ["Recipe", "fit"]
