import platform
import subprocess
import sys

import pytest

from urank.allocation import keep_freed_memory

RESIDENT = """
import ctypes, resource
from pathlib import Path
from urank.allocation import keep_freed_memory

{setting}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
block = libc.malloc(256 << 20)
ctypes.memset(block, 1, 256 << 20)
libc.free(block)
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20)
"""


def resident(setting):
    """MiB that a process holds after it has freed 256 of them."""
    command = [sys.executable, "-c", RESIDENT.format(setting=setting)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_freed_memory_is_kept_until_it_is_told_otherwise():
    given_back = resident("")
    kept = resident("assert keep_freed_memory()")
    assert kept > given_back + 200
    assert abs(resident("keep_freed_memory(); assert keep_freed_memory(False)") - given_back) < 50


def test_other_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
