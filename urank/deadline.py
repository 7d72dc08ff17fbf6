"""A time after which nothing more is begun."""

import time

from urank.distributed import totals


class OutOfTime(Exception):
    """The time allowed is over. What was finished is on disk; the message says what was not."""


def check_time(deadline: float | None, left: str) -> None:
    """Raise `OutOfTime(left)` once `time.monotonic()` has passed `deadline`, in all processes as soon as in one."""
    if totals(int(deadline is not None and time.monotonic() >= deadline))[0]:
        raise OutOfTime(left)
