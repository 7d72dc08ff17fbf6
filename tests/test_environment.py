"""pyproject.toml states lower bounds, requirements.txt pins the development environment; the two agree."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from urank.reproduction.provenance import VERSIONS_OF

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {extra: [Requirement(text) for text in texts] for extra, texts in PROJECT["optional-dependencies"].items()}
BOUNDS = [*CORE, *(requirement for extra in EXTRAS.values() for requirement in extra)]


def read_lock():
    """The requirements of requirements.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


LOCK = {canonicalize_name(requirement.name): requirement for requirement in read_lock()}


def version_of(requirement):
    """The version that `requirement` pins."""
    [specifier] = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, requirement
    return specifier.version


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_the_lock_satisfies_every_bound(bound):
    assert {">="} <= {specifier.operator for specifier in bound.specifier} <= {">=", "<"}
    assert bound.specifier.contains(version_of(LOCK[canonicalize_name(bound.name)]))


def test_the_lock_pins_nothing_else():
    assert LOCK.keys() == {canonicalize_name(bound.name) for bound in BOUNDS}
    assert len(read_lock()) == len(LOCK)


def test_the_lock_is_installed():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in LOCK}
    assert installed == {name: version_of(requirement) for name, requirement in LOCK.items()}


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "torchvision",
        "timm",
        "jupyterlab",
        "jupyter-book",
        "matplotlib",
        "pandas",
        "papermill",
        "pytest",
        "nbval",
    ],
)
def test_the_lock_contains_the_main_tools(name):
    assert name in LOCK


def test_conda_installs_the_lock():
    assert CONDA["name"] == "urank"
    *conda, last = CONDA["dependencies"]
    assert last == {"pip": ["-r requirements.txt", "-e ."]}
    assert {"python", "pip"} <= {re.split("[=<>!~ ]", entry)[0] for entry in conda}


def test_conda_s_python_is_supported():
    [python] = [entry for entry in CONDA["dependencies"] if str(entry).startswith("python=")]
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert supported.contains(python.split("=")[-1]) and supported.contains(sys.version.split()[0])


CONFIGURATION = [
    "environment.yml",
    "Makefile",
    "Snakefile",
    ".ci/run",
    ".github/workflows/*.yml",
    ".pre-commit-config.yaml",
]


@pytest.mark.parametrize(
    "path", sorted(path for pattern in CONFIGURATION for path in ROOT.glob(pattern)), ids=lambda path: path.name
)
def test_no_other_file_states_a_version(path):
    text = path.read_text()
    assert [name for name in LOCK if re.search(rf"(?i)(?<![\w-]){name}\s*[=<>~!]=?\s*[\"']?\d", text)] == []


@pytest.mark.parametrize("name", VERSIONS_OF)
def test_records_name_pinned_packages(name):
    assert name in LOCK


def test_every_folder_of_the_package_is_installed():
    """setuptools finds packages by their `__init__.py`."""
    folders = {path.parent for path in (ROOT / "urank").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


OWN = {"urank", "benchmarks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
OPTIONAL = {"delve"}  # the benchmark is compared with it where it is installed
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def imported_by(paths, lazily=True):
    """The distributions whose packages the modules import, at their top or, if `lazily`, anywhere."""
    nodes = [node for path in paths for node in _nodes(ast.parse(path.read_text()), lazily)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.split(".")[0] for name in names} - OWN - OPTIONAL - set(sys.stdlib_module_names)
    return {canonicalize_name(DISTRIBUTIONS.get(package, [package])[0]) for package in packages}


def _nodes(tree, lazily):
    return ast.walk(tree) if lazily else tree.body


def names_of(*requirements):
    return {canonicalize_name(requirement.name) for each in requirements for requirement in each}


LIBRARY = [path for path in (ROOT / "urank").rglob("*.py") if "reproduction" not in path.parts]
REPRODUCTION = [path for path in (ROOT / "urank").rglob("*.py") if "reproduction" in path.parts]


def test_the_library_imports_what_it_declares():
    """Extras only inside the functions that use them."""
    assert imported_by(LIBRARY, lazily=False) <= names_of(CORE)
    assert imported_by(LIBRARY) <= names_of(CORE, EXTRAS["reproduction"])


def test_the_reproduction_imports_what_it_declares():
    assert imported_by(REPRODUCTION) <= names_of(CORE, EXTRAS["reproduction"])


def test_tests_and_benchmarks_import_what_is_declared():
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert imported_by(files) <= names_of(BOUNDS)


def test_no_dependency_of_the_library_is_unused():
    assert names_of(CORE) <= imported_by([*LIBRARY, *REPRODUCTION])
