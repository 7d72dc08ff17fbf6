"""Which code measured a thing, and on which machine."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from urank.numerics import processor

# Modules of `reproduction` whose code decides what an experiment measures; of the package, all but `cli` and these.
MEASURING = ("experiment", "record", "run_folder", "runner", "stages", "provenance")
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn")


def code_files() -> list[Path]:
    """Return the modules whose code decides what an experiment measures."""
    package = Path(__file__).parents[1]
    library = {path for path in package.rglob("*.py") if "reproduction" not in path.parts and path.stem != "cli"}
    return sorted(library | {package / "reproduction" / f"{name}.py" for name in MEASURING})


def code_digest() -> str:
    """Twelve hexadecimal digits that change with the code an experiment runs; of the code that this process runs."""
    return CODE


def digest(*paths: Path) -> str:
    """Twelve hexadecimal digits that change with the content of the files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of Python and of the packages that a measurement may depend on, as they are now."""
    return {package: version(package) for package in VERSIONS_OF} | dict(python=platform.python_version())


def describe(device: torch.device) -> str:
    """The GPU, or the processor with the instructions torch uses: a name like "AMD EPYC" spans a factor of four."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, threads = processor().get("cpu_name") or platform.machine(), torch.get_num_threads()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


CODE = digest(*code_files())  # as it is imported: a file may be edited while the process runs
