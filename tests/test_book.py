"""The notebooks' sources, and the book that `make test` builds from them at the smoke profile."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from matplotlib.testing.compare import compare_images

import urank
from urank.reproduction import figures, profiles
from urank.reproduction.profiles import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILD = ROOT / "build" / "smoke"
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
PAGES = [TOC["root"]] + [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))

SHOWN = [path for path in SOURCES if path.stem.startswith(("figure", "table"))]  # the others are pages about them
TABLES = {"coverage", "discrepancies", "status", "table2_hyperparameters"}  # pages without a picture

built = pytest.mark.skipif(not (BUILD / "_build").exists(), reason="the book is not built; `make test` builds it")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
class TestSources:
    def test_have_no_outputs(self, path):
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert cells and not any(cell.outputs or cell.execution_count for cell in cells)

    def test_have_one_cell_of_parameters_with_a_profile(self, path):
        cells = nbformat.read(path, 4).cells
        [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert re.search(r'^profile = "quick"', parameters.source, re.MULTILINE)

    def test_are_in_the_table_of_contents(self, path):
        assert f"notebooks/{path.stem}" in PAGES


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_figures_and_tables_have_the_three_parts_and_exercises(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0].startswith("What the paper")
    assert headings[1] == "The recorded measurement"
    assert headings[2].startswith("Live")
    assert headings[-1] == "Try it"
    [parameters] = [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert re.search(r'^record = "', parameters.source, re.MULTILINE)


def test_every_figure_and_table_of_the_paper_has_its_notebook():
    numbers = [path.stem.split("_")[0] for path in SHOWN]
    assert sorted(numbers) == ["figure1", "figure2", "figure3", "table1", "table2", "table3", "table4", "table5"]


def test_the_first_picture_is_drawn_from_the_committed_record(tmp_path):
    """`make book/figure1.png` after the record or the figure has changed."""
    committed, drawn = ROOT / "book" / "figure1.png", tmp_path / "figure1.png"
    figures.spectra(*profiles.recorded("cifar10/vgg11")).savefig(drawn, dpi=130)
    assert compare_images(str(committed), str(drawn), tol=1) is None


def test_the_page_of_the_package_has_every_public_name():
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", (ROOT / "book" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(urank.__all__)


def test_the_table_of_contents_names_every_page_once():
    prose = [f"book/{path.stem}" for path in sorted((ROOT / "book").glob("*.md"))]
    assert sorted(PAGES) == sorted(prose + [f"notebooks/{path.stem}" for path in SOURCES])


def html(page: str) -> str:
    return (BUILD / "_build" / "html" / f"{page}.html").read_text()


@built
@pytest.mark.parametrize("page", PAGES)
class TestPages:
    def test_loads_nothing_from_the_network(self, page):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?:[^"]*)"', html(page))
        assert loaded == []

    def test_finds_every_local_file_it_loads(self, page):
        place = (BUILD / "_build" / "html" / page).parent
        files = re.findall(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="([^"#?:]+)["?]', html(page))
        assert files and [file for file in files if not (place / file).exists()] == []


@built
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
class TestExecuted:
    def outputs(self, path: Path) -> list:
        executed = nbformat.read(BUILD / "site" / "notebooks" / path.name, 4)
        return [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]

    def test_without_error_or_warning(self, path):
        assert not [output for output in self.outputs(path) if output.output_type == "error"]
        assert not [output.text for output in self.outputs(path) if output.get("name") == "stderr"]

    def test_shows_something_and_the_page_holds_its_pictures(self, path):
        pictures = [output for output in self.outputs(path) if "image/png" in output.get("data", {})]
        assert bool(pictures) == (path.stem not in TABLES)
        assert any("text/html" in output.get("data", {}) for output in self.outputs(path))
        assert len(re.findall(r'<img\b[^>]*src="\.\./_images/', html(f"notebooks/{path.stem}"))) == len(pictures)

    def test_has_no_identifier_that_changes_from_run_to_run(self, path):
        tables = [output.data["text/html"] for output in self.outputs(path) if "text/html" in output.get("data", {})]
        identifiers = [identifier for table in tables for identifier in re.findall(r'<table id="T_([^"]*)"', table)]
        assert len(identifiers) == len(tables)  # every table is styled
        assert [one for one in identifiers if re.fullmatch(r"[0-9a-f]{5}", one)] == []
        assert len(set(identifiers)) == len(identifiers)


@built
@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_says_from_which_run_its_live_numbers_are(path):
    assert "digits10" in html(f"notebooks/{path.stem}")
