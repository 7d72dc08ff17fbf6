import re
from dataclasses import replace

import pandas as pd
import pytest
from conftest import TINY, finished

from urank.reproduction import status
from urank.training.recipe import Recipe


@pytest.fixture(scope="module")
def record():
    """The tiny record in the place of the paper's VGG11 on CIFAR-10."""
    return replace(finished()[1], experiment=replace(TINY, dataset="cifar10", data={}, width=1.0))


def seeded(record, seed, original, **settings):
    """The record with another seed, settings and accuracy, one point more after fine-tuning."""
    experiment = replace(record.experiment, seed=seed, sweep=(), **settings)
    accuracy = replace(record.accuracy, original=original, finetuned=original + 1)
    return replace(record, experiment=experiment, accuracy=accuracy)


def rows(frame, item):
    return frame[frame["item"] == item].set_index("quantity")


def test_without_records_every_row_says_what_it_needs():
    frame = status.table([])
    assert frame.columns.tolist() == status.COLUMNS
    counted = frame["device"] == "counted"
    assert (frame["runs"] == counted).all() and ((frame["needs"] == "") == counted).all()
    assert status.predictors(frame).empty and status.summary(frame).endswith("no quantity")
    items = frame["item"].str.split(":").str[0].value_counts()
    assert items.to_dict() == {
        "Table 1": 16, "Table 3": 14, "Table 4": 3, "Table 5": 4, "Figure 1(b)": 1, "Figure 2": 2, "Second paper": 9
    }  # fmt: skip
    assert frame[frame["item"].str.startswith("Table 1")]["needs"].str.contains("ImageNet and about .* GPU hours").all()


def test_of_one_record(record):
    frame = rows(status.table([seeded(record, 0, 91.0)]), "Table 3: VGG11, cifar10")
    assert frame.index.tolist() == ["original %", "change", "MLU of W %", "MLU %", "params", "MACs"]
    assert frame["paper"].tolist() == [91.5, 1.0, 98, 47, 0.34, 0.60]
    assert frame["ours"].tolist() == pytest.approx(
        [91.0, 1.0, 100 * record.plan.weight_mlu, 100 * record.plan.mlu, record.params_ratio, record.macs_ratio]
    )
    assert (frame["difference"] == frame["ours"] - frame["paper"]).all()
    assert frame[["low", "high"]].isna().all(axis=None) and (frame["runs"] == 1).all()
    assert (frame["page"] == "table3_cifar").all()
    assert set(frame["date"]) == {record.made["finetune"]["date"]}


def test_changes_of_deit_are_against_the_network_that_was_split(record):
    deit = seeded(record, 0, 72.0, dataset="imagenet-1k", network="timm/deit_tiny_patch16_224")
    frame = rows(status.table([deit]), "Table 1: DeiT-Tiny")
    assert frame.loc["change", "paper"] == 2.9  # printed: -0.3, against the fine-tuned original


def test_of_two_seeds_is_their_mean_and_both(record):
    frame = status.table([seeded(record, 0, 90.0), seeded(record, 1, 92.0)])
    row = rows(frame, "Table 3: VGG11, cifar10").loc["original %"]
    assert (row["ours"], row["runs"], row["difference"]) == (91.0, 2, -0.5)
    assert (row["low"], row["high"]) == (90.0, 92.0)


@pytest.mark.parametrize("other", [dict(width=0.5), dict(dataset="digits10"), dict(variant="linear-probe")])
def test_another_network_than_the_paper_s_is_not_compared(record, other):
    frame = rows(status.table([seeded(record, 0, 91.0, **other)]), "Table 3: VGG11, cifar10")
    assert frame["runs"].tolist() == [0]


def test_table_5_is_one_network_at_several_tolerances(record):
    weights = ("IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1")
    place = dict(dataset="imagenet-1k", network="torchvision/vit_b_16", tolerance=0.1, pretrained=weights[0])
    taken = Recipe(epochs=0)
    plain = seeded(record, 0, 80.0, **place, train=taken)
    others = [
        seeded(record, 0, 60.0, **place | dict(pretrained=weights[1]), train=taken, variant="linear-probe"),
        seeded(record, 0, 80.0, **place, train=taken, variant="isolated", mode="isolated"),
    ]
    strict = seeded(record, 0, 80.0, **place | dict(tolerance=0.01), train=taken, variant="eps")
    frame = status.table([plain, *others, strict])
    for tolerance in ("0.1", "0.01"):
        row = rows(frame, f"Table 5: ViTB16, {tolerance}").loc["original %"]
        assert (row["ours"], row["runs"]) == (80.0, 1)


def test_what_was_not_fine_tuned_is_said_to_be_missing(record):
    frame = status.table([seeded(record, 0, 91.0, finetune=Recipe(epochs=0))])
    assert "change" not in rows(frame, "Table 3: VGG11, cifar10").index
    [missing] = frame[frame["item"] == "Table 3: VGG11, cifar10, change"].to_dict("records")
    assert missing["runs"] == 0 and missing["needs"].startswith("fine-tuning: a GPU")


def test_figure_1_is_the_least_energy_that_is_enough(record):
    lost = [9, 9, 9, 1, 0] + [0] * 9  # one of 80 images is the tolerance
    sweep = [row for row in record.sweep if row.layer == "features.8"]
    kept = [replace(row, correct=record.plan.correct - images) for row, images in zip(sweep, lost, strict=True)]
    frame = status.table([replace(record, sweep=tuple(kept))])
    [row] = frame[frame["item"].str.startswith("Figure 1")].to_dict("records")
    assert (row["paper"], row["ours"], row["difference"]) == (80, 60, -20)
    nothing = replace(record, sweep=tuple(replace(row, correct=0) for row in sweep))
    assert status.smallest_sufficient_energy(nothing) == 100


def test_figure_2_is_the_layer_of_the_largest_rank(record):
    frame = status.table([record])
    [row] = frame[frame["item"] == "Figure 2: rank peak of VGG11 on CIFAR10"].to_dict("records")
    ranks = [entry.rank for entry in record.plan.layers]
    assert row["ours"] == 1 + ranks.index(max(ranks)) and row["paper"] == "4 to 6"


def test_sizes_of_the_second_paper_are_counted_and_its_accuracies_missing():
    frame = status.table([])
    sizes = frame[frame["quantity"] == "params (M), no classifier"].set_index("item")
    assert sizes["paper"].tolist() == [13.4, 11.1, 43.0]
    assert sizes["ours"].tolist() == [13.466176, 11.048832, 43.331328]
    needs = frame[frame["item"].str.startswith("Second paper") & (frame["runs"] == 0)].set_index("item")["needs"]
    assert needs["Second paper: ResNet50-PE"] == "the printed numbers: they could not be recovered"
    tiny = [needs[f"Second paper: HaLViT-Tiny, {epochs} epochs"] for epochs in (300, 600)]
    hours = [int(re.search(r"about (\d+) GPU hours", text)[1]) for text in tiny]
    assert hours[1] == pytest.approx(2 * hours[0], abs=1)
    assert "recipe" in needs["Second paper: ResNet50 (HaLViT), accuracy"]


def measured_as(printed, ours):
    """The table of a quantity that is printed and measured in several rows."""
    rows = [
        dict(item=f"Table 3: {number}", quantity="MLU %", paper=paper, ours=value, difference=value - paper, runs=1)
        for number, (paper, value) in enumerate(zip(printed, ours))
    ]
    return pd.DataFrame(rows, columns=status.COLUMNS).assign(dataset="cifar10")


def test_predictors_compare_with_constants():
    frame = status.predictors(measured_as([30, 50, 70], [32, 52, 72]))
    assert frame.loc["MLU %", ["rows", "bias", "mean error"]].tolist() == [3, 2, 2]
    assert frame.loc["MLU %", "correlation"] == pytest.approx(1)
    assert frame.loc["MLU %", "error of the paper's mean"] == pytest.approx(40 / 3)
    assert frame.loc["MLU %", "error of our mean"] == pytest.approx((22 + 2 + 18) / 3)


def test_constants_are_those_of_a_data_set():
    """Two data sets that differ; within each, ours are in the opposite order."""
    frame = measured_as([10, 20, 80, 90], [20, 10, 90, 80]).assign(dataset=["cifar10"] * 2 + ["cifar100"] * 2)
    found = status.predictors(frame).loc["MLU %"]
    assert found["correlation"] > 0.9 and found["within a data set"] == pytest.approx(-1)
    assert (found["mean error"], found["error of the paper's mean"]) == (10, 5)
    assert status.informative(frame) == []


@pytest.mark.parametrize("ours, expected", [([35, 50, 71], ["MLU %"]), ([70, 50, 30], []), ([80, 100, 120], [])])
def test_informative_is_closer_than_both_constants(ours, expected):
    """Close; in the opposite order; in the right order, but too far for any use."""
    frame = measured_as([30, 50, 70], ours)
    assert status.informative(frame) == expected
    assert status.summary(frame).endswith("MLU %" if expected else "no quantity")


def test_changes_against_full_rank_are_means_over_seeds(record):
    seeds = [
        replace(one, accuracy=replace(one.accuracy, baseline=baseline))
        for one, baseline in ((seeded(record, 0, 90.0), 92.0), (seeded(record, 1, 92.0), 93.5))
    ]
    elsewhere = seeded(record, 0, 91.0, dataset="digits10", data={})
    untested = seeded(record, 0, 60.0, dataset="cifar100")
    untested = replace(untested, accuracy=replace(untested.accuracy, baseline=None))
    frame = status.against_full_rank([*seeds, elsewhere, untested])
    assert frame.index.tolist() == [("cifar10", "vgg11"), ("cifar100", "vgg11")]
    assert frame.iloc[0][[*status.CHANGES, "runs"]].tolist() == [1, 1.75, -0.75, 2]
    assert frame.iloc[0][["low", "high"]].tolist() == [-1, -0.5]
    assert frame.iloc[1]["change"] == 1 and frame.iloc[1][status.CHANGES[1:]].isna().all()


class TestHeatMap:
    def test_has_rows_by_quantities_with_intervals(self, record):
        seeds = [seeded(record, 0, 90.0), seeded(record, 1, 92.0)]
        html = status.heat_map(status.table([*seeds, seeded(record, 0, 60.0, dataset="cifar100")])).to_html()
        assert re.findall(r"<th [^>]*col_heading[^>]*>(.*?)</th>", html) == list(status.QUANTITIES)
        assert re.findall(r"<th [^>]*row_heading[^>]*>.*>Table 3: (.*?)</a>", html) == [
            "VGG11, cifar10",
            "VGG11, cifar100",
        ]
        assert ">-0.5 (-1.5 to +0.5)<" in html and ">-6.9<" in html  # 91 and 60 %, where the paper has 91.5 and 66.9

    @pytest.mark.parametrize(
        "share, color",
        [(0.5, "213, 94, 0, 0.30"), (-0.5, "0, 114, 178, 0.30"), (-7, "0, 114, 178, 0.60"), (0, ", 0.00")],
    )
    def test_colours_by_sign_and_size(self, share, color):
        assert status.background(share).endswith(f"{color})")
        assert status.background(float("nan")) == ""


def test_a_new_record_names_those_it_leaves_behind(record):
    """As after a run of more epochs: another seed of the former recipe, and a search of the former weights."""
    longer = replace(record.experiment.train, epochs=9)
    former = seeded(record, 2, 91.0, train=longer)
    searched = seeded(record, 0, 91.0, variant="isolated", start="cifar10/vgg11", train=Recipe(epochs=0))
    other = replace(searched, weights="others")
    committed = [record, seeded(record, 1, 90.0), former, other]
    notes = status.outdated("cifar10/vgg11", committed)
    assert [note.partition(" has other ")[0] for note in notes] == ["cifar10/vgg11-s2", "cifar10/vgg11@isolated"]
    assert status.outdated("cifar10/vgg11", [record, seeded(record, 1, 90.0), searched]) == []


def test_pages_are_the_same_each_time(record):
    frame = status.table([record])
    for draw in (status.style, status.style_missing, status.heat_map, status.style_predictors):
        assert draw(frame).to_html() == draw(frame).to_html()
    assert '<a href="table3_cifar.html">Table 3: VGG11, cifar10</a>' in status.style(frame).to_html()
