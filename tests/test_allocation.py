import platform
import subprocess
import sys

import pytest

from urank.allocation import free_memory, keep_freed_memory

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


@pytest.mark.parametrize("own, group", [("9:name=systemd:/\n0::/\n", ""), ("0::/job_7/step_0\n", "job_7/step_0")])
def test_a_container_has_less_memory_than_its_machine(tmp_path, own, group):
    (tmp_path / "cgroup").write_text(own)
    folder = tmp_path / "groups" / group
    folder.mkdir(parents=True)
    (folder / "memory.current").write_text("30000000\n")
    (folder / "memory.max").write_text("50000000\n")
    assert free_memory(tmp_path / "groups", tmp_path / "cgroup") == 20_000_000
    (folder / "memory.max").write_text("max\n")
    assert free_memory(tmp_path / "groups", tmp_path / "cgroup") > 50_000_000


def test_where_there_are_no_groups_the_machine_counts(tmp_path):
    assert free_memory(tmp_path, tmp_path / "missing") > 50_000_000
