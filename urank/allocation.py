"""Where freed memory goes: back to the system, or to the next layer.

glibc takes each block of more than 32 MiB anew from the system and gives it back when it is freed, and the system
zeroes its pages for whoever touches them next. The activations of a few hundred images are such blocks: a thin network
on a processor can spend more time on this than on its convolutions. The speed page has the ratios.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
DEFAULTS = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}
KEEPING = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}


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
