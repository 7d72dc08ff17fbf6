"""How much memory this process may take, and where freed memory goes: back to the system, or to the next layer.

glibc takes each block of more than 32 MiB anew from the system and gives it back when it is freed, and the system
zeroes its pages for whoever touches them next. The activations of a few hundred images are such blocks: a thin network
on a processor can spend more time on this than on its convolutions. The speed page has the ratios.
"""

import ctypes
import platform
from pathlib import Path

import psutil

KEEPING = {-1: -1, -4: 0}  # mallopt's M_TRIM_THRESHOLD and M_MMAP_MAX: never
CGROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for what it allocates next.

    Networks are then evaluated faster on the processor, and the process stays as large as it has been. The `urank`
    command does so; a library does not decide this for the process that imports it, and there is no way back. Nothing
    that is computed changes. Of blocks above 64 MiB only those of the main thread are kept.

    Returns:
        Whether it was done: other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return all(ctypes.CDLL(None).mallopt(option, value) for option, value in KEEPING.items())


def give_back_freed_memory() -> None:
    """Give the system what was freed and kept until now, where the C library can (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take: of the machine, or of a container around it (cgroup v2) that has less.

    What the process itself has freed counts, and is given back for that.
    """
    give_back_freed_memory()
    free = [psutil.virtual_memory().available]
    for path in own.read_text().splitlines() if own.exists() else []:
        if path.startswith("0::/"):
            group = cgroups / path.removeprefix("0::/")
            free += [left for one in (group, *group.parents) if (left := left_in(one)) is not None]
    return max(0, min(free))


def left_in(group: Path) -> int | None:
    """Bytes that a control group may still take, its cached files counted as free; None where it has no limit."""
    limit = group / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    if most == "max":
        return None
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / "memory.current").read_text()) + int(counts["inactive_file"])
