"""`benchmarks.choices` and `benchmarks.subjects`, on a tiny network."""

import os
from pathlib import Path

import pandas as pd
import pytest
import torch

import urank
from benchmarks import choices, subjects
from urank.layers import weight_matrix

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def subject():
    digits = urank.datasets.load("digits10", train=1000, test=100, plain=True)
    torch.manual_seed(0)
    model = urank.create("vgg11", 10, 0.125)
    urank.fit(model, digits, urank.Recipe(epochs=4, batch_size=25, lr=0.05, crop=2, flip=False), progress=False)
    return subjects.Subject.of("tiny", model.eval(), digits, 400)


@pytest.fixture
def here(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    monkeypatch.setenv("URANK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(choices, "load", lambda *_: subject)
    return tmp_path


def test_every_choice_has_the_size_of_the_search(subject, here, monkeypatch):
    monkeypatch.setattr(choices, "TOLERANCES", (2.0,))
    monkeypatch.setattr(choices, "KEEPS", (0.6,))
    choices.curves("tiny")
    rows = pd.read_csv(here / "choices.csv")
    sizes = rows.loc[rows["target"] == "keep 0.6", "kept"]
    assert len(sizes) == 3 and sizes.between(50, 60).all()
    rows = rows[rows["target"] == "tolerance 2"].set_index("choice")
    assert len(rows) == 9 and rows["kept"].between(rows.loc["two-sided", "kept"] - 5, rows["kept"].max()).all()
    assert rows.loc["random", "accuracy"] < rows.loc["output PCA", "accuracy"]
    plan = choices.search(subject, tolerance=2.0)
    assert rows.loc["two-sided", "mlu"] == round(100 * plan.mlu, 2)
    before = (here / "choices.csv").read_text()
    choices.curves("tiny")  # nothing is left to do
    assert (here / "choices.csv").read_text() == before
    plan.save(here / "plan.json")
    choices.curves("tiny", plan=here / "plan.json")
    assert (here / "choices.csv").read_text() == before


def test_sides_budgets_and_noise(subject, here, monkeypatch):
    monkeypatch.setattr(choices, "DRAWS", 1)
    monkeypatch.setattr(choices, "PARTS", (2,))
    monkeypatch.setattr(choices, "RULES", (dict(tolerance=0.1), dict(budget=5.0)))
    for command in (choices.half, choices.budgets):
        command("tiny")
    choices.noise("tiny", tolerance=2.0)
    half = pd.read_csv(here / "half_searches.csv").iloc[0]
    assert half["probes output"] < half["probes both"] and half["layers"] == 9
    budgets = pd.read_csv(here / "budgets.csv").set_index("rule")
    assert list(budgets.index) == ["tolerance 0.1", "budget 5"]
    lost = budgets["original"] - budgets["projected"]
    assert 0 < lost["budget 5"] <= 5 and budgets.loc["budget 5", "mlu"] < budgets.loc["tolerance 0.1", "mlu"]
    noise = pd.read_csv(here / "noise.csv").set_index("images drawn")
    assert list(noise.index) == ["all", "bootstrap 0", "part 1 of 2", "part 2 of 2"]
    assert noise["images"].tolist() == [100, 100, 50, 50]
    assert noise["lost on other"].notna().tolist() == [False, False, True, True]
    assert [len(ranks.split()) for ranks in noise["ranks"]] == [9] * 4


def test_a_ladder_contains_the_answer_of_the_search(subject, here):
    choices.ladders("tiny", tolerance=2.0, count=2)
    rows = pd.read_csv(here / "ladders.csv")
    plan = choices.search(subject, tolerance=2.0)
    for layer, steps in rows.groupby("layer"):
        found, steps = plan[layer], steps.set_index("k")["correct"]
        assert len(steps) == found.m and steps[found.k_t] >= steps[found.m] - 2
        assert steps[found.k_t] == found.correct


def test_uniform_shares_and_random_subspaces(subject):
    plan = choices.uniform(subject, 0.5)
    assert 0.4 < choices.share_kept(subject, choices.built(subject, plan)) <= 0.5
    split = plan.useful_part()
    network = choices.in_random_subspaces(subject, split, seed=0)
    assert len(split.layers) > 5
    for entry in split.layers:
        assert weight_matrix(network.get_submodule(entry.layer).pair[1]).shape == (entry.rank, entry.m)


def test_networks_are_tuned_from_every_choice(subject, here, monkeypatch):
    setting = subjects.Setting(0.06, 100, urank.Recipe(epochs=1, batch_size=50, lr=0.03, crop=2, flip=False))
    monkeypatch.setitem(subjects.SMALL, "vgg11", setting)
    monkeypatch.setattr(choices, "small", lambda *_: subject)
    choices.tuned("small vgg11", seeds=1, tolerance=2.0)
    rows = pd.read_csv(here / "tuned.csv").set_index("choice")
    assert len(rows) == 8 and rows.loc["full rank", "kept"] == 100
    assert rows.loc["two-sided", "before"] == rows.loc["two-sided, balanced", "before"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the public weights and images that are kept beside the project")
@pytest.mark.skipif("URANK_DATA" not in os.environ, reason="needs CIFAR-10; set URANK_DATA")
def test_a_public_resnet_is_as_good_as_published():
    assert choices.accuracy(found := subjects.load("resnet32", SHARED), found.network) == 92.63
