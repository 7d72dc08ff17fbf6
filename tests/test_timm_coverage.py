import pandas as pd
import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import timm_coverage
from benchmarks.timm_coverage import COLUMNS, describe, examine, walk
from urank.reproduction import coverage_tables

NAMES = [
    "test_vit",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_maxvit",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "regnetx_002",
    "densenet121",
    "wide_resnet50_2",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("walk") / "coverage.csv"
    list(walk(NAMES, path, forward=True))
    return pd.read_csv(path).set_index("name")


def test_each_architecture_has_a_row(table):
    assert list(table.index) == NAMES and table.index.name == COLUMNS[0] and list(table) == COLUMNS[1:]
    assert table["error"].isna().all()
    assert table["family"].nunique() > 7 and table.loc["test_resnet", "family"] == "resnet"
    assert (table["measured_layers"] > 5).all() and table["measured_share"].between(0.5, 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_shares_are_of_all_parameters(table, name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert table.loc[name, "params"] == sum(parameter.numel() for parameter in model.parameters())
    skipped = [float(entry.rpartition(": ")[2]) for entry in table.loc[name, "skipped"].split("; ")]
    assert sum(skipped) + table.loc[name, "measured_share"] == pytest.approx(1, abs=5e-4)


def test_layers_are_those_of_the_architecture(table):
    assert table.loc["wide_resnet50_2", "measured_layers"] == 50 + 4
    assert table.loc["densenet121", "measured_layers"] == 121
    assert table.loc["swin_tiny_patch4_window7_224", "measured_layers"] == 12 * 4 + 3 + 2
    assert table.loc["mixer_s32_224", "measured_layers"] == 8 * 4 + 2
    assert "grouped convolution" in table.loc["regnetx_002", "skipped"]


def test_the_least_measured_are_named_with_their_reasons(table):
    assert "grouped convolution" in table.loc["test_convnext", "skipped"]


class Odd(nn.Module):
    """A layer that runs twice, one that never does, one in groups, and a table of its own."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 100, bias=False)
        self.grouped, self.head = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.zeros(4, 5))

    def forward(self, images):
        return self.head(self.grouped(self.twice(self.twice(images))).mean((2, 3)))


def test_what_a_forward_pass_does_not_use_is_told():
    with torch.device("meta"):
        model = Odd()
    params = 36 + 6 + 600 + 72 + 4 + 8 + 2 + 20
    row = describe(model, torch.zeros(1, 4, 6, 6, device="meta"))
    assert row["params"] == params and row["measured_layers"] == 2
    assert row["measured_share"] == pytest.approx((42 + 10) / params, abs=5e-5)
    skipped = dict(entry.rsplit(": ", 1) for entry in row["skipped"].split("; "))
    assert float(skipped["the forward pass never multiplies by its weight"]) == pytest.approx(600 / params, abs=5e-5)
    assert float(skipped["grouped convolution: a stack of matrices, not one"]) == pytest.approx(76 / params, abs=5e-5)
    assert float(skipped["Odd is not a linear layer or a 2-d convolution"]) == pytest.approx(20 / params, abs=5e-5)
    assert describe(model, None)["measured_layers"] == 3


@pytest.fixture
def broken():
    """An architecture that cannot be built."""

    def broken_net(pretrained=False, **_):
        raise ZeroDivisionError("no such\nthing")

    broken_net.__module__ = "timm.models.resnet"
    timm.models._registry._model_entrypoints["broken_net"] = broken_net
    yield "broken_net"
    del timm.models._registry._model_entrypoints["broken_net"]


def test_an_error_is_in_the_row_and_the_walk_goes_on(broken, tmp_path):
    rows = list(walk([broken, "test_resnet"], tmp_path / "coverage.csv", forward=False))
    assert rows[0] == dict(name=broken, family="resnet", error="ZeroDivisionError: no such thing")
    assert rows[1] == examine("test_resnet", forward=False) and "error" not in rows[1]
    frame = pd.read_csv(tmp_path / "coverage.csv")
    assert coverage_tables.totals(frame).tolist() == [2, 1, 1, f"{rows[1]['measured_share']:.1%}"]


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path):
    path, run = tmp_path / "coverage.csv", CliRunner()
    app = timm_coverage.typer.Typer()
    app.command()(timm_coverage.main)
    first = run.invoke(app, [str(path), "test_resnet"])
    assert first.exit_code == 0 and first.stdout.split()[:2] == ["architectures", "1"]
    before = path.read_text()
    second = run.invoke(app, [str(path), "test_resnet", "test_vit*"])
    assert second.exit_code == 0, second.output
    assert path.read_text().startswith(before)
    names = pd.read_csv(path)["name"]
    assert names.is_unique and set(names) == {"test_resnet", *timm.list_models("test_vit*")}


def test_the_committed_walk_is_of_all_of_timm_and_came_through():
    frame = pd.read_csv(coverage_tables.COVERAGE)
    assert list(frame) == COLUMNS and set(frame["name"]) == set(timm.list_models())
    assert frame["error"].isna().mean() >= 0.99


def test_tables_show_what_the_walk_found(table):
    frame = table.reset_index()
    shares = frame.groupby("family")["measured_share"].mean()
    assert set(coverage_tables.families(frame).index) == set(shares[shares < 0.99].index)
    reasons = coverage_tables.reasons(frame)["share of all parameters"]
    assert reasons.sum() == pytest.approx(1 - frame["measured_share"].mean(), abs=5e-4)
    assert reasons["grouped convolution: a stack of matrices, not one"] > 0
    broken = frame.assign(error=["no such thing", *[None] * (len(frame) - 1)])
    assert coverage_tables.refused(broken)["error"].tolist() == ["no such thing"]
    assert coverage_tables.refused(frame).empty
