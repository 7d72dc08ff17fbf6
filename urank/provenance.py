"""Which code measured a thing, and on which machine."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from urank.precision import processor

# Modules of the package that no measurement depends on.
PRESENTATION = (
    "figures", "paper", "speed", "surveys", "status", "effort", "discrepancies", "transformer_cost", "profiles",
    "agreement", "cli", "__init__", "__main__",
)  # fmt: skip
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn")


def code_files() -> list[Path]:
    """The modules whose code decides what an experiment measures."""
    package = Path(__file__).parent
    return sorted(path for path in package.rglob("*.py") if top_level(path.relative_to(package)) not in PRESENTATION)


def top_level(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def code_digest() -> str:
    """Twelve hexadecimal digits that change with the code an experiment runs; of the code that this process runs."""
    return CODE


def digest(*paths: Path) -> str:
    """Twelve hexadecimal digits that change with the content of the files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def tensors_digest(text: str, *tensors: Tensor) -> str:
    """Twelve hexadecimal digits that change with `text` and with the content of the tensors."""
    hasher = hashlib.sha256(text.encode())
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()[:12]


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
