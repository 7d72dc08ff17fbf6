"""Stop long work before a deadline, at a point from which it can be resumed."""

import time

from urank.distributed import totals


class OutOfTime(Exception):
    """The deadline is too close to continue; finished work is on disk, and the message names what is left."""


def check_time(deadline: float | None, left: str, takes: float = 0.0) -> None:
    """Raise `OutOfTime` with the message `left` if fewer than `takes` seconds remain; see `is_over`."""
    if is_over(deadline, takes):
        raise OutOfTime(left)


def is_over(deadline: float | None, takes: float = 0.0) -> bool:
    """Return True if fewer than `takes` seconds remain until the deadline, in this process or in any other one.

    Args:
        deadline: value of `time.monotonic()`; None for no deadline.
        takes: expected duration of the next step, in seconds.

    >>> is_over(time.monotonic() + 60, takes=90), is_over(None)
    (True, False)
    """
    return totals(int(deadline is not None and time.monotonic() + takes >= deadline))[0] > 0
