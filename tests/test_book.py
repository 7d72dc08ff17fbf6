"""The notebooks, the pages, the README, and the book that `make test` builds with the smoke profile."""

import json
import re
from pathlib import Path
from statistics import mean

import nbformat
import pandas as pd
import pytest
import yaml
from matplotlib.testing.compare import compare_images

import urank
from urank.reproduction import figures, profiles
from urank.reproduction.profiles import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILD = ROOT / "build" / "smoke"
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
CHAPTERS = [chapter for part in TOC["parts"] for chapter in part["chapters"]]
PAGES = [TOC["root"]] + [page["file"] for chapter in CHAPTERS for page in (chapter, *chapter.get("sections", []))]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))

NUMBERED = [path for path in SOURCES if path.stem.startswith(("figure", "table"))]  # the others are about these
SHOWN = [path for path in NUMBERED if not path.stem.endswith("_details")]
TABLES = {"discrepancies", "status", "table2_hyperparameters"}  # pages without a picture

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

    def test_begin_with_one_cell_that_installs_the_package_where_it_is_missing(self, path):
        """See test_wheel.py for what the cell does there."""
        first, expected = (
            next(cell for cell in nbformat.read(one, 4).cells if cell.cell_type == "code") for one in (path, SOURCES[0])
        )
        assert 'find_spec("urank")' in first.source
        assert (first.id, first.source, first.metadata) == (expected.id, expected.source, expected.metadata)

    def test_lose_no_line_of_prose(self, path):
        """In MyST, a line that starts with % is a comment."""
        prose = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        assert not re.search(r"^\s*%", "\n".join(prose), re.MULTILINE)

    def test_are_in_the_table_of_contents(self, path):
        assert f"notebooks/{path.stem}" in PAGES


def test_every_figure_and_table_of_the_paper_has_its_notebook():
    numbers = [path.stem.split("_")[0] for path in SHOWN]
    assert sorted(numbers) == ["figure1", "figure2", "figure3", "table1", "table2", "table3", "table4", "table5"]


def test_the_first_picture_is_drawn_from_the_committed_record(tmp_path):
    """Run `make book/figure1.png` after a change of the record or of the figure."""
    committed, drawn = ROOT / "book" / "figure1.png", tmp_path / "figure1.png"
    figures.spectra(*profiles.recorded("cifar10/vgg11")).savefig(drawn, dpi=130)
    assert compare_images(str(committed), str(drawn), tol=1) is None


def test_the_page_of_the_package_has_every_public_name():
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", (ROOT / "book" / "api.md").read_text(), re.MULTILINE)
    assert named == [name for name in urank.__all__ if name != "__version__"]


def test_the_table_of_contents_names_every_page_once():
    prose = [f"book/{path.stem}" for path in sorted((ROOT / "book").glob("*.md"))]
    assert sorted(PAGES) == sorted(prose + [f"notebooks/{path.stem}" for path in SOURCES])


def test_every_function_that_a_page_links_to_is_on_the_page_of_the_package():
    api = (ROOT / "book" / "api.md").read_text()
    names = re.findall(r"^\.\. auto(?:function|class):: (?:urank\.)?([\w.]+)$", api, re.MULTILINE)
    pages = "".join(path.read_text() for path in (ROOT / "book").glob("*.md"))
    linked = re.findall(r"\{(?:func|class)\}`urank\.([\w.]+)`", pages)
    assert linked and sorted(set(linked) - set(names)) == []


def test_the_example_of_the_readme_makes_a_smaller_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert 0 < names["measured"].plan.mlu < 1 and (tmp_path / "report.html").exists()
    assert urank.count_cost(names["compact"]).params < urank.count_cost(names["model"]).params


def numbers_of_findings(page: Path) -> dict[str, list[str]]:
    """Return the numbers in "measured" and then in "paper" for each question in a page's table of findings."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if re.match(r"\| .*\? \|", line)]
    number = re.compile(r"(?<![\w/-])[+−]?\d+(?:\.\d+)?")  # not the digits of VGG11 and ViT-B/16
    return {question.strip(): number.findall(measured + paper) for question, measured, paper, _ in rows}


def printed(table: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "paper" / f"{table}.csv")


@pytest.fixture(scope="module")
def records() -> pd.DataFrame:
    """One row per committed record: what the table of findings is computed from."""
    rows = {}
    for path in (ROOT / "data" / "records").rglob("*.json"):
        content = json.loads(path.read_text())
        plan, accuracy = urank.RankPlan.from_dict(content["plan"]), pd.Series(content["accuracy"], dtype=float)
        speeds = pd.DataFrame(content["latency"]).query("batch == 256 and precision == 'float32'")
        speeds = speeds.drop_duplicates("network").set_index("network")["images_per_second"]  # on the first device
        rows[path.relative_to(ROOT / "data" / "records").with_suffix("").as_posix()] = dict(
            mlu=100 * plan.mlu,
            layers=plan.layers,
            lost=accuracy["original"] - accuracy["projected"],
            change=accuracy["finetuned"] - accuracy["original"],
            baseline_change=accuracy["baseline"] - accuracy["original"],
            throughput=speeds["compact"] / speeds["original"],
        )
    return pd.DataFrame.from_dict(rows, orient="index")


@pytest.fixture(scope="module")
def table3(records) -> pd.DataFrame:
    """The networks of Table 3, of several seeds the mean, with the printed MLU and change of accuracy."""
    paper = printed("table3_cifar")
    names = paper["dataset"].str.lower() + "/" + paper["model"].str.lower()
    numbers = records.drop(columns="layers").astype(float)
    means = numbers.groupby(numbers.index.str.replace(r"-s\d+$", "", regex=True)).mean()
    return means.loc[names].assign(
        layers=records["layers"][names].tolist(),
        paper_mlu=paper["mlu"].tolist(),
        paper_change=paper["delta_printed"].tolist(),
    )


@pytest.fixture(scope="module")
def findings(records, table3) -> list[list[float]]:
    """The numbers in each row of the table of findings, recomputed."""
    mlu, change, paper_change = records["mlu"], table3["change"], table3["paper_change"]
    behind = (change - table3["baseline_change"]).dropna()
    layers = table3["layers"].explode()
    limited = pd.Series([layer.rank == layer.k_t for layer in layers])
    wide = pd.Series([layer.m >= layer.d for layer in layers])
    number = table3["layers"].str.len()
    vgg = table3.index.str.contains("vgg")
    pair = ["cifar100/vgg11", "cifar100/resnet18"]
    longer = [f"{name}@finetuned-longer" for name in pair]
    choices = pd.read_csv(ROOT / "data" / "benchmarks" / "choices.csv")
    choices = choices[choices["network"].str.startswith("deit") & (choices["target"] == "tolerance 0.1")].set_index(
        "choice"
    )
    noise = pd.read_csv(ROOT / "data" / "benchmarks" / "noise.csv")
    draws = noise[noise["images drawn"].str.startswith("bootstrap")].groupby("network")["mlu"]
    measurements = ROOT / "data" / "measurements" / "imagenet-1k"
    deit = urank.RankPlan.load(measurements / "deit_tiny_patch16_224" / "plan.json")

    def extremes(values: pd.Series) -> list[float]:
        return [values.min(), values.max()]

    return [
        [*extremes(table3["mlu"]), (table3["mlu"] - table3["paper_mlu"]).abs().mean()]
        + [table3["mlu"].corr(table3["paper_mlu"]), *extremes(table3["paper_mlu"])],
        [(change < 0).sum(), len(change), change.mean()]
        + [(paper_change < 0).sum(), len(paper_change), paper_change.mean()],
        [(behind < 0).sum(), len(behind), behind.mean()],
        [value for before, after in zip(pair, longer) for value in records["change"][[before, after]]]
        + [*records["baseline_change"][longer], *paper_change[pair]],
        [limited.sum(), len(layers), limited[wide].sum(), wide.sum()],
        [*extremes(table3["throughput"][vgg]), *extremes(table3["throughput"][~vgg])],
        [*extremes(table3["lost"][number == 9]), 9, *extremes(table3["lost"][number == 104]), 104]
        + [2 * 9 * 0.1, 2 * 104 * 0.1],
        [0.01, 0.1, 0.5, *mlu[["cifar100/resnet18@eps-0.01", "cifar100/resnet18", "cifar100/resnet18@eps-0.5"]]]
        + printed("table5_epsilon").set_index("epsilon_pct")["mlu"][["0.01", "0.1", "0.5"]].tolist(),
        [*mlu[["cifar10/vgg11", "cifar10/vgg11@isolated", "cifar10/resnet18", "cifar10/resnet18@isolated"]]],
        [*mlu[["digits10/vit@linear-probe", "digits10/vit@end-to-end", "digits10/vit"]]]
        + printed("table4_pretraining")["mlu"].tolist()[1:]
        + printed("table4_pretraining")["mlu"].tolist()[:1],
        [100 * deit.mlu, sum(layer.rank == layer.k_t for layer in deit.layers), len(deit.layers)]
        + printed("table1_imagenet").set_index("model")["mlu"][["DeiT-Tiny"]].tolist(),
        (choices["original"] - choices["accuracy"])[["projected", "two-sided", "output PCA"]].tolist(),
        (draws.max() - draws.min()).tolist(),
        *findings_of_twins(),
    ]


def findings_of_twins() -> list[list[float]]:
    """The numbers in the rows about tied matrices: means over the seeds."""
    rows = [
        dict(
            network=record.experiment.network,
            mlp=100 * mean(layer.utilization for layer in record.plan.layers if ".mlp." in layer.layer),
            whole=record.accuracy.baseline,
            split=record.accuracy.merged,
            params=record.cost.original.params,
            compact=record.cost.compact.params,
        )
        for record in profiles.recorded("cifar10/vit*")
        if record.experiment.variant == "small"
    ]
    full, tied = (rows for _, rows in pd.DataFrame(rows).groupby("network").mean().iterrows())
    split = [full["whole"] - full["split"], 100 * full["compact"] / full["params"]]
    return [[full["mlp"], tied["mlp"]], split + [full["whole"] - tied["whole"], 100 * tied["params"] / full["params"]]]


@pytest.mark.parametrize("page", ["README.md", "book/intro.md"])
def test_the_findings_are_those_of_the_records(page, findings):
    stated = numbers_of_findings(ROOT / page)
    for (question, texts), expected in zip(stated.items(), findings, strict=True):
        decimals = [len(text.partition(".")[2]) for text in texts]
        rounded = [f"{value:.{places}f}" for value, places in zip(expected, decimals, strict=True)]
        assert [text.replace("−", "-").lstrip("+") for text in texts] == rounded, question


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
        kinds = {"image/png", "image/svg+xml"}
        pictures = [output for output in self.outputs(path) if kinds & set(output.get("data", {}))]
        assert bool(pictures) == (path.stem not in TABLES)
        assert any("text/html" in output.get("data", {}) for output in self.outputs(path))
        assert len(re.findall(r'<img\b[^>]*src="\.\./_images/', html(f"notebooks/{path.stem}"))) == len(pictures)

    def test_has_no_identifier_that_changes_from_run_to_run(self, path):
        pages = [output.data["text/html"] for output in self.outputs(path) if "text/html" in output.get("data", {})]
        tables = [page for page in pages if "<table" in page]
        identifiers = [identifier for table in tables for identifier in re.findall(r'<table id="T_([^"]*)"', table)]
        assert len(identifiers) == len(tables)  # every table is styled
        assert [one for one in identifiers if re.fullmatch(r"[0-9a-f]{5}", one)] == []
        assert len(set(identifiers)) == len(identifiers)


@built
@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_names_the_run_of_its_live_numbers(path):
    assert "digits10" in html(f"notebooks/{path.stem}")
