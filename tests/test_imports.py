"""Imports run one way: library <- models, datasets, training <- reproduction <- command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "urank"
LEVELS = {"models": 1, "datasets": 1, "training": 1, "reproduction": 2, "cli_measure": 3, "cli": 3}
OUTSIDE = {
    "urank",
    "urank.__main__",
}  # `import urank` exports networks and training too; `python -m urank` is a command


def module_name(path):
    """The dotted name of the module in a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(module):
    """The place of a module in the order of imports; `urank` itself exports networks and training, so it has theirs."""
    part = module.split(".")[1] if "." in module else "models"
    return LEVELS.get(part, 0)


def imports_of(path):
    """The modules of the package that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [_submodule(node.module, alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "urank")


def _submodule(module, name):
    """What `from module import name` imports: a module of that name or, if there is none, `module`."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


@pytest.mark.parametrize("module", sorted(MODULES.keys() - OUTSIDE))
def test_a_module_imports_no_later_part(module):
    later = [name for name in imports_of(MODULES[module]) if level(name) > level(module)]
    assert later == []


@pytest.mark.parametrize("module", sorted(name for name in MODULES.keys() - OUTSIDE if level(name) < 2))
def test_the_library_knows_no_file_outside_the_package(module):
    """It must work from a wheel, where the repository's folders are not beside it."""
    names = {
        getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(ast.parse(MODULES[module].read_text()))
    }
    assert not names & {"__file__", "ROOT"}


HEAVY = (
    "sklearn",
    "scipy",
    "matplotlib",
    "pandas.plotting._matplotlib",
    "IPython",
    "jupyter",
    "ipykernel",
    "ipywidgets",
)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, urank; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "urank.layers" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []
