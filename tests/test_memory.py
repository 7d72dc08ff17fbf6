import platform
import subprocess
import sys

import pytest

from urank.memory import free_memory, keep_freed_memory

FAULTS = """
import ctypes, resource
from urank.memory import keep_freed_memory

{setting}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

for size in (8 << 20, 256 << 20):
    use(size), use(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        use(size)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (4 * size))
"""


def faults(setting):
    """The share of pages that fault on each allocation of 8 MiB and of 256 MiB."""
    command = [sys.executable, "-c", FAULTS.format(setting=setting)]
    return [float(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", [False, True]),  # the default of glibc
        ("assert keep_freed_memory()", [False, False]),
    ],
)
def test_freed_memory_is_kept(setting, expected):
    shares = faults(setting)
    assert [share > 0.5 for share in shares] == expected, shares


def test_other_c_libraries_are_not_changed(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def limit(group, most, used, cached=0):
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


@pytest.mark.parametrize("own, group", [("9:name=systemd:/\n0::/\n", ""), ("0::/job_7/step_0\n", "job_7/step_0")])
def test_free_memory_respects_the_limit_of_a_container(tmp_path, own, group):
    (tmp_path / "cgroup").write_text(own)
    limit(tmp_path / "groups" / group, 50_000_000, used=30_000_000, cached=4_000_000)
    assert free_memory(tmp_path / "groups", tmp_path / "cgroup") == 24_000_000
    limit(tmp_path / "groups" / group, "max", used=30_000_000)
    assert free_memory(tmp_path / "groups", tmp_path / "cgroup") > 50_000_000


def test_free_memory_respects_the_limit_of_outer_groups(tmp_path):
    (tmp_path / "cgroup").write_text("0::/job_7/step_0\n")
    limit(tmp_path / "groups" / "job_7", 40_000_000, used=30_000_000)
    limit(tmp_path / "groups" / "job_7" / "step_0", "max", used=30_000_000)
    assert free_memory(tmp_path / "groups", tmp_path / "cgroup") == 10_000_000


def test_without_control_groups_returns_the_memory_of_the_machine(tmp_path):
    assert free_memory(tmp_path, tmp_path / "missing") > 50_000_000
