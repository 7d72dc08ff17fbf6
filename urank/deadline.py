"""A time by which work stops: nothing is begun after it, nor what would not end before it."""

import time

from urank.distributed import totals


class OutOfTime(Exception):
    """The time allowed is over. What was finished is on disk; the message says what was not."""


def check_time(deadline: float | None, left: str, takes: float = 0.0) -> None:
    """Raise `OutOfTime(left)` where `is_over(deadline, takes)`."""
    if is_over(deadline, takes):
        raise OutOfTime(left)


def is_over(deadline: float | None, takes: float = 0.0) -> bool:
    """Whether `deadline`, of `time.monotonic()`, is less than `takes` seconds away.

    It is for all processes as soon as it is for one.
    """
    return totals(int(deadline is not None and time.monotonic() + takes >= deadline))[0] > 0
