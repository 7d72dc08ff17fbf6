"""Versions are stated once, in requirements.txt; whatever else installs the project reads that file."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from urank.reproduction.provenance import VERSIONS_OF

ROOT = Path(__file__).parent.parent
LINES = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
REQUIREMENTS = [line for line in LINES if line]
PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(\[[a-z,]+\])?==([0-9][0-9A-Za-z.]*)(\s*;.*)?")


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    return {normalized(match[1]): match[3] for match in map(PINNED.fullmatch, REQUIREMENTS) if match}


def test_every_package_of_the_project_is_installed():
    """An editable installation has them all; one that is not has those that setuptools finds."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert wanted == ["urank*"]
    folders = {path.parent for path in (ROOT / "urank").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_requirement_is_pinned():
    assert [line for line in REQUIREMENTS if not PINNED.fullmatch(line)] == []
    assert len(pins()) == len(REQUIREMENTS) > 0


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "urank"
    *plain, last = environment["dependencies"]
    assert last == {"pip": ["-r requirements.txt", "-e ."]}
    names = {re.split("[=<>!~ ]", entry)[0] for entry in plain}
    assert {"python", "pip"} <= names


def test_pip_installs_the_same():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    assert "dependencies" in project["dynamic"] and "dependencies" not in project
    assert "optional-dependencies" not in project and "dependency-groups" not in content
    assert content["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


PLACES = ["pyproject.toml", "environment.yml", "Makefile", "Snakefile", ".ci/run", ".github/workflows/*.yml"]


@pytest.mark.parametrize(
    "path", sorted(path for place in PLACES for path in ROOT.glob(place)), ids=lambda path: path.name
)
def test_no_version_is_stated_twice(path):
    text = path.read_text()
    stated = [name for name in pins() if re.search(rf"(?i)(?<![\w-]){name}\s*[=<>~!]=?\s*[\"']?\d", text)]
    assert stated == []


def test_conda_s_python_is_allowed_by_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [python] = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert least.startswith(">=")
    version, minimum = (tuple(map(int, text.split("."))) for text in (python.split("=")[-1], least[2:]))
    assert version >= minimum and sys.version_info >= minimum


@pytest.mark.parametrize("name", VERSIONS_OF)
def test_what_records_name_is_what_is_pinned(name):
    assert importlib.metadata.version(name).split("+")[0] == pins()[name]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


OPTIONAL = {"delve"}  # the benchmark compares with it where somebody has installed it


def test_every_package_that_is_imported_is_required():
    own = {"urank", "benchmarks", "conftest"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    files = [path for folder in ("urank", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    names = {name for path in files for name in imported(path)} - own - OPTIONAL
    names -= set(sys.stdlib_module_names)
    distributions = importlib.metadata.packages_distributions()
    missing = {name for name in names if not {normalized(d) for d in distributions.get(name, [])} & set(pins())}
    assert missing == set()
