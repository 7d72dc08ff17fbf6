"""Control and measure the memory of this process (Linux with glibc).

By default glibc returns every freed block above 32 MiB to the operating system, and Linux zeroes its pages before they
are used again. The activations of a few hundred images are such blocks. On a CPU a thin network can spend more time on
zeroing pages than on its convolutions.
"""

import ctypes
import platform
from pathlib import Path

import psutil

# mallopt options M_TRIM_THRESHOLD and M_MMAP_MAX: never trim the heap, never use mmap for large blocks.
KEEP_FREED_BLOCKS = {-1: -1, -4: 0}
CGROUPS = Path("/sys/fs/cgroup")


def uses_glibc() -> bool:
    """Return True if the C library is glibc, whose allocator this module controls."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Keep freed memory in this process and reuse it for later allocations.

    This speeds up evaluation on a CPU; results do not change. The process then keeps the memory of its peak usage, and
    the setting cannot be reverted. The `urank` command calls this function; the library never does. glibc still returns
    blocks above 64 MiB that other threads than the main one free.

    Returns:
        True if the setting was applied, False if the C library is not glibc.

    >>> applied = keep_freed_memory()
    """
    if not uses_glibc():
        return False
    return all(ctypes.CDLL(None).mallopt(option, value) for option, value in KEEP_FREED_BLOCKS.items())


def give_back_freed_memory() -> None:
    """Return the memory that this process has freed and kept to the operating system (glibc only)."""
    if uses_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many bytes this process can still allocate on this machine or in its container (cgroup v2).

    Memory that this process has freed is first returned to the operating system, so that it counts as free.

    Args:
        cgroups: mount point of the control groups.
        own: file that lists the control groups of this process.
    """
    give_back_freed_memory()
    free = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines() if own.exists() else []:
        if line.startswith("0::/"):
            group = cgroups / line.removeprefix("0::/")
            free += [left for one in (group, *group.parents) if (left := left_in(one)) is not None]
    return max(0, min(free))


def left_in(group: Path) -> int | None:
    """Return how many bytes a control group can still allocate, or None if it has no limit.

    The kernel drops inactive cached files when memory is short, so they count as free.
    """
    limit = group / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    if most == "max":
        return None
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / "memory.current").read_text()) + int(counts["inactive_file"])
