"""Which code and which machine computed a result."""

import ast
import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from urank.reproduction.paths import ROOT

# The modules of `reproduction` that affect what an experiment measures. The library, models, datasets and training
# always do; the command line and the other modules of `reproduction` only display results.
MEASURING = ("paths", "experiment", "record", "run_folder", "runner", "stages", "provenance")
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn")


def code_files() -> list[Path]:
    """Return the modules that affect what an experiment measures."""
    package = Path(__file__).parents[1]
    shown = ("cli", "cli_measure", "measure", "report", "errors")  # an experiment does not import these
    library = {path for path in package.rglob("*.py") if "reproduction" not in path.parts and path.stem not in shown}
    return sorted(library | {package / "reproduction" / f"{name}.py" for name in MEASURING})


def code_digest() -> str:
    """Return twelve hexadecimal digits that identify the code of this process, without comments and docstrings."""
    return CODE


def statements(source: str) -> str:
    """Return Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def digest(*contents: bytes) -> str:
    """Return twelve hexadecimal digits that identify the contents."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Return twelve hexadecimal digits that identify the content of a file."""
    return digest(path.read_bytes())


@cache
def git_state() -> dict[str, str | bool | None]:
    """Return the git `commit` of the checkout and whether its tracked files are `clean`; None outside a checkout."""
    try:
        commit = git("rev-parse", "HEAD")
        return dict(commit=commit[:12], clean=not git("status", "--porcelain", "--untracked-files=no"))
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or not a checkout
        return dict(commit=None, clean=None)


def git(*arguments: str) -> str:
    """Return what a git command prints in the checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that a measurement depends on."""
    return {package: version(package) for package in VERSIONS_OF} | dict(python=platform.python_version())


# Computed at import, because a file may be edited while the process runs.
CODE = digest(*(statements(path.read_text()).encode() for path in code_files()))
