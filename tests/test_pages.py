"""The pages of figures and tables in five parts, most of them with a page of details below them."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from urank.reproduction.paths import NOTEBOOKS, ROOT

PARTS = ["The paper's claim", "What we measured", "One step, live", "What we learned", "Limits"]
DETAILS = sorted(NOTEBOOKS.glob("*_details.ipynb"))
DETAILED = [path.with_stem(path.stem.removesuffix("_details")) for path in DETAILS]
PAGES = DETAILED + [NOTEBOOKS / "table2_hyperparameters.ipynb", NOTEBOOKS / "coverage.ipynb"]
WORDS = 500  # of prose on a page
LINES = 15  # of a cell that a reader sees

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def cells_by_part(path: Path) -> dict[str, list]:
    """Return the cells below each heading of the second level; a cell that contains a heading begins a part."""
    parts: dict[str, list] = {}
    name = ""
    for cell in nbformat.read(path, 4).cells:
        headings = re.findall(r"^## (.*)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        name = headings[-1] if headings else name
        parts.setdefault(name, []).append(cell)
    return parts


def is_visible(cell) -> bool:
    return cell.cell_type == "code" and not {"hide-cell", "hide-input", "remove-cell"} & set(
        cell.metadata.get("tags", [])
    )


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


@each_page
class TestPages:
    def test_have_five_parts(self, path):
        assert re.findall(r"^## (.*)$", prose(path), re.MULTILINE) == PARTS

    def test_are_short(self, path):
        assert len(prose(path).split()) <= WORDS

    def test_show_what_was_measured_before_words_and_fold_the_code(self, path):
        parts = cells_by_part(path)
        measured = parts["What we measured"]
        assert measured[0].source.strip() == "## What we measured" and measured[1].cell_type == "code"
        assert not any(map(is_visible, [*parts["The paper's claim"], *measured]))

    def test_compute_live_from_the_public_library(self, path):
        shown = [cell.source for cell in cells_by_part(path)["One step, live"] if is_visible(cell)]
        assert len(shown) >= 2 and "urank." in "\n".join(shown)

    def test_have_short_cells(self, path):
        shown = [cell.source for cells in cells_by_part(path).values() for cell in cells if is_visible(cell)]
        assert [source for source in shown if len(source.splitlines()) > LINES] == []

    def test_back_three_sentences_by_assertions(self, path):
        cells = cells_by_part(path)["What we learned"]
        assert re.findall(r"^(\d)\. ", cells[0].source, re.MULTILINE) == ["1", "2", "3"]
        assert sum(cell.source.count("assert ") for cell in cells if is_visible(cell)) >= 3


@pytest.mark.parametrize("path", DETAILED, ids=lambda path: path.stem)
def test_link_to_their_details(path):
    assert f"]({path.stem}_details.ipynb)" in prose(path)


@pytest.mark.parametrize("path", DETAILS, ids=lambda path: path.stem)
def test_details_are_below_their_page(path):
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    below = {page["file"]: page.get("sections", []) for part in contents["parts"] for page in part["chapters"]}
    page = path.stem.removesuffix("_details")
    assert {"file": f"notebooks/{path.stem}"} in below[f"notebooks/{page}"]
    assert f"]({page}.ipynb)" in prose(path)
