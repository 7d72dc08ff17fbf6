"""The walkthrough: it runs with different parameters, and a reader can follow its visible cells."""

import ast
import re

import nbformat
import papermill
import pytest

import urank
from urank.reproduction.profiles import ROOT

SOURCE = ROOT / "notebooks" / "walkthrough.ipynb"
STEPS = 13
HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
LIBRARY = {"urank", "urank.datasets", "urank.subspaces"}


def python(cell) -> str:
    """Return the source of a code cell without IPython's magic and shell commands."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)


def imported(code: str) -> set[str]:
    """Return the modules that `code` imports; `from urank import datasets` is "urank.datasets"."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def attributes(code: str, module: str) -> set[str]:
    """Return the names that `code` reads from `module`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == module}


@pytest.fixture(scope="module")
def cells():
    return nbformat.read(SOURCE, 4).cells


def test_visible_cells_have_at_most_15_lines(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    visible = [cell for cell in code if not HIDDEN & set(cell.metadata.get("tags", []))]
    assert len(visible) >= STEPS
    assert {cell.id: len(cell.source.splitlines()) for cell in visible if len(cell.source.splitlines()) > 15} == {}


def test_uses_the_public_library_only(cells):
    code = "\n".join(python(cell) for cell in cells if cell.cell_type == "code")
    assert {module for module in imported(code) if module.split(".")[0] == "urank"} == LIBRARY
    assert attributes(code, "urank") <= set(urank.__all__)
    assert {"fit", "accumulate_grams", "search_ranks", "decompose"} <= attributes(code, "urank")


def test_every_step_says_what_it_showed_and_what_to_change(cells):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    steps = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    numbered = [step for step in steps if re.match(r"\d+\. ", step)]
    assert [int(step.split(".")[0]) for step in numbered] == list(range(1, STEPS + 1))
    for step in numbered:
        assert step.count("**What this shows:**") == step.count("**Change this:**") == 1, step.splitlines()[0]


def test_runs_with_other_parameters(tmp_path):
    """The book and nbval run the walkthrough with its own parameters."""
    parameters = dict(layer="fc1", epsilon=2.0, calibration=100, seed=1)
    executed = papermill.execute_notebook(
        SOURCE, tmp_path / "walkthrough.ipynb", dict(profile="smoke") | parameters, progress_bar=False
    )
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    printed = {name: "".join(output.get("text", "") for output in parts) for name, parts in outputs.items()}
    accuracy = float(re.search(r"test accuracy: ([\d.]+) %", printed["fit"])[1])
    assert accuracy > 80
    assert re.search(r"may cost (\d+) of 200 images", printed["bisect-layer"])[1] == str(int(2 * parameters["epsilon"]))
    assert not [output for parts in outputs.values() for output in parts if output.get("name") == "stderr"]
    kinds = [kind for parts in outputs.values() for output in parts for kind in output.get("data", {})]
    assert kinds.count("image/svg+xml") >= STEPS
    assert kinds.count("text/html") == 2  # the ranks and the results
