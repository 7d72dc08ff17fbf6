"""How much memory this process may take, and where freed memory goes: back to the system, or to the next layer.

glibc takes each block of more than 32 MiB anew from the system and gives it back when it is freed, and the system
zeroes its pages for whoever touches them next. The activations of a few hundred images are such blocks: a thin network
on a processor can spend more time on this than on its convolutions. The speed page has the ratios.
"""

import ctypes
import platform
from pathlib import Path

import psutil

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
DEFAULTS = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}
KEEPING = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
CGROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep what it frees, for what it allocates next.

    Networks then run faster on the processor, and the process stays as large as it has been. The `urank` command does
    so; a library does not decide this for the process that imports it. Nothing that is computed changes.

    Args:
        keep: False for glibc's defaults.

    Returns:
        Whether it was done: other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in (KEEPING if keep else DEFAULTS).items())


def free_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take: of the machine, or of its container where that (cgroup v2) has less."""
    free = psutil.virtual_memory().available
    paths = own.read_text().splitlines() if own.exists() else []
    for group in (cgroups / path.removeprefix("0::/") for path in paths if path.startswith("0::/")):
        limit = group / "memory.max"
        if limit.exists() and limit.read_text().strip() != "max":
            free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)
