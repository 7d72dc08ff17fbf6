"""The rank search: which dimensions of S and T keep the accuracy within a tolerance (sections 2.2 and 5.3)."""

from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.search.validation import Validation, evaluate

__all__ = ["Replay", "Validation", "evaluate", "search_ranks"]
