"""The two pictures on the first page of the book."""

import json
import re
from html import unescape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from urank.reproduction.figures import overview
from urank.reproduction.profiles import ROOT


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return overview.table3_networks()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def points(axis) -> list[tuple[float, float]]:
    """The coordinates of every marker on the axis."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.get_lines() if len(line.get_xdata()) == 1]


def numbers_in(path) -> list[dict]:
    """The numbers in the metadata of a picture."""
    [text] = re.findall(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)
    return json.loads(unescape(text))


@pytest.mark.parametrize("name", overview.PICTURES)
def test_the_committed_pictures_show_the_committed_records(name, table, tmp_path):
    """Run `make book/mlu.svg book/full_rank.svg` after a change of the records or of the pictures."""
    drawn = tmp_path / f"{name}.svg"
    overview.save(drawn)
    np.testing.assert_equal(numbers_in(ROOT / "book" / f"{name}.svg"), numbers_in(drawn))
    assert [row["compact"] for row in numbers_in(drawn)] == pytest.approx(table["compact"])


def test_mlu_has_one_named_point_per_network(table):
    [axis] = overview.mlu_as_printed(table).axes
    assert points(axis) == list(zip(table["paper_mlu"], table["mlu"]))
    assert [text.get_text() for text in axis.texts][1:-1] == table["model"].tolist()
    assert all(np.diff(axis.get_xlim()) == np.diff(axis.get_ylim()))


def test_dumbbells_join_networks_with_the_same_fine_tuning(table):
    [axis] = overview.compact_and_full_rank(table).axes
    rows = table.dropna(subset="full_rank")
    joined = [list(line.get_xdata()) for line in axis.get_lines()[1:] if len(line.get_xdata()) == 2]
    assert joined == rows[["compact", "full_rank"]].to_numpy().tolist()
    shown = {x for x, _ in points(axis)}
    assert shown == {*rows["compact"], *rows["full_rank"], *rows["paper_compact"]}
    assert [label.get_text() for label in axis.get_yticklabels()][0] == "VGG11, CIFAR-10"


def test_a_family_has_one_colour_in_both_pictures(table):
    for name, draw in overview.PICTURES.items():
        colors = {
            to_hex(line.get_markeredgecolor()) for line in draw(table).axes[0].get_lines() if line.get_marker() == "o"
        }
        assert colors == {color.lower() for color in overview.FAMILY_COLORS.values()}, name


def test_the_titles_state_what_the_records_show(table):
    """ "Mean layer utilization is reproduced" and "Every compact network ends below full rank"."""
    assert table["mlu"].corr(table["paper_mlu"]) > 0.95
    assert (table["mlu"] - table["paper_mlu"]).abs().mean() < 5
    rows = table.dropna(subset="full_rank")
    assert len(rows) == 12 and (rows["compact"] < rows["full_rank"]).all()
