from dataclasses import replace

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
    assert (frame["verdict"] == "not run").all() and (frame["needs"] != "").all()
    items = frame["item"].str.split(":").str[0].value_counts()
    assert items.to_dict() == {
        "Table 1": 16, "Table 3": 14, "Table 4": 3, "Table 5": 4, "Figure 1(b)": 1, "Figure 2": 2
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
    assert frame["spread"].isna().all() and (frame["runs"] == 1).all()
    assert (frame["page"] == "table3_cifar").all()
    assert set(frame["date"]) == {record.made["finetune"]["date"]}
    assert frame.loc["original %", "verdict"] == frame.loc["change", "verdict"] == "green"


def test_changes_of_deit_are_against_the_network_that_was_split(record):
    deit = seeded(record, 0, 72.0, dataset="imagenet-1k", network="timm/deit_tiny_patch16_224")
    frame = rows(status.table([deit]), "Table 1: DeiT-Tiny")
    assert frame.loc["change", "paper"] == 2.9  # printed: -0.3, against the fine-tuned original


def test_of_two_seeds_is_their_mean_and_standard_deviation(record):
    frame = status.table([seeded(record, 0, 90.0), seeded(record, 1, 92.0)])
    row = rows(frame, "Table 3: VGG11, cifar10").loc["original %"]
    assert (row["ours"], row["runs"], row["difference"]) == (91.0, 2, -0.5)
    assert row["spread"] == pytest.approx(2**0.5)


@pytest.mark.parametrize("other", [dict(width=0.5), dict(dataset="digits10"), dict(variant="linear-probe")])
def test_another_network_than_the_paper_s_is_not_compared(record, other):
    frame = rows(status.table([seeded(record, 0, 91.0, **other)]), "Table 3: VGG11, cifar10")
    assert frame["verdict"].tolist() == ["not run"]


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
    assert missing["verdict"] == "not run" and missing["needs"].startswith("fine-tuning: a GPU")


def test_figure_1_is_the_least_energy_that_is_enough(record):
    lost = [9, 9, 9, 1, 0] + [0] * 9  # one of 80 images is the tolerance
    sweep = [row for row in record.sweep if row.layer == "features.8"]
    kept = [replace(row, correct=record.plan.correct - images) for row, images in zip(sweep, lost, strict=True)]
    frame = status.table([replace(record, sweep=tuple(kept))])
    [row] = frame[frame["item"].str.startswith("Figure 1")].to_dict("records")
    assert (row["paper"], row["ours"], row["verdict"]) == (80, 60, "amber")
    nothing = replace(record, sweep=tuple(replace(row, correct=0) for row in sweep))
    assert status.smallest_sufficient_energy(nothing) == 100


def test_figure_2_is_the_layer_of_the_largest_rank(record):
    frame = status.table([record])
    [row] = frame[frame["item"] == "Figure 2: rank peak of VGG11 on CIFAR10"].to_dict("records")
    ranks = [entry.rank for entry in record.plan.layers]
    assert row["ours"] == 1 + ranks.index(max(ranks)) and row["paper"] == "4 to 6"


def test_counts_are_of_each_quantity(record):
    gains = seeded(record, 0, 91.0)
    losses = seeded(record, 0, 60.0, dataset="cifar100")
    losses = replace(losses, accuracy=replace(losses.accuracy, finetuned=59.5))
    frame = status.table([gains, losses])
    counts = status.counts(frame)
    assert counts.loc["change", ["numbers", "opposite sign", "rows"]].tolist() == [2, 1, 2]
    measured = (frame["verdict"] != "not run").sum()
    assert counts.loc["all", ["numbers", "rows not run"]].tolist() == [measured, len(frame) - measured]
    assert (counts[["green", "amber", "red"]].sum(axis=1) == counts["numbers"]).all()
    assert status.summary(frame).startswith(f"{measured} numbers measured: ")
    assert status.counts(status.table([gains])).loc["change", "opposite sign"] == 0


@pytest.mark.parametrize(
    "quantity, difference, expected",
    [
        ("original %", 0.5, "green"), ("original %", -0.5, "green"), ("original %", -0.6, "amber"),
        ("change", 1.5, "amber"), ("change", -1.6, "red"), ("MLU %", 10, "green"), ("MLU %", -20.1, "red"),
        ("params", 0.3 - 0.2, "green"), ("MACs", 0.15, "amber"), ("peak layer", 1, "amber"),
    ],
)  # fmt: skip
def test_verdict_follows_the_margins(quantity, difference, expected):
    assert status.verdict(quantity, difference) == expected


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
    for draw in (status.style, status.style_missing):
        assert draw(frame).to_html() == draw(frame).to_html()
    assert '<a href="table3_cifar.html">Table 3: VGG11, cifar10</a>' in status.style(frame).to_html()
