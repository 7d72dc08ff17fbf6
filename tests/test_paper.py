import pytest

from urank import datasets, models
from urank.reproduction import paper


def test_table3_has_the_paper_s_rows():
    table = paper.table3()
    assert len(table) == 14
    assert not table.duplicated(["network", "dataset"]).any()
    assert set(table["dataset"]) == {"cifar10", "cifar100"} < set(datasets.CLASSES)
    assert {"vgg11", "vgg13", "vgg16", "vgg19"} <= set(table["network"]) & set(models.NETWORKS)
    assert table["network"].value_counts().eq(2).all()  # each on both data sets


def test_table3_prints_what_its_rows_say():
    table = paper.table3()
    difference = table["decomposed_top1"] - table["original_top1"]
    assert (difference - table["delta"]).abs().max() < 1e-9
    assert table["original_top1"].between(50, 100).all() and table["decomposed_top1"].between(50, 100).all()
    assert (table["mlu"] < table["original_mlu"]).all()
    assert table[["params_ratio", "flops_ratio"]].stack().between(0, 1).all()


def test_table3_of_vgg11_as_printed():
    table = paper.table3().set_index(["dataset", "network"])
    columns = [
        "original_top1",
        "original_mlu",
        "decomposed_top1",
        "mlu",
        "params_ratio",
        "flops_ratio",
        "delta",
    ]
    assert table.loc[("cifar10", "vgg11"), columns].tolist() == [91.5, 98, 92.5, 47, 0.34, 0.60, 1.0]
    assert table.loc[("cifar100", "vgg19"), columns].tolist() == [70.2, 99, 71.8, 51, 0.38, 0.68, 1.6]


@pytest.mark.parametrize("path", sorted(paper.PAPER.glob("*.csv")), ids=lambda path: path.stem)
def test_every_file_is_a_table(path):
    assert len(paper.table(path.stem)) > 0


def test_a_table_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="table99.csv.*checkout"):
        paper.table("table99")


def test_tables_name_networks_that_can_be_created():
    for printed, rows in ((paper.table1(), 16), (paper.table4(), 3), (paper.table5(), 4)):
        assert len(printed) == rows and set(printed["dataset"]) == {"imagenet-1k"}
        for network in printed["network"]:
            models.check_name(network)


def test_table4_has_each_way_to_train_once():
    assert paper.table4()["variant"].tolist() == ["", "linear-probe", "end-to-end"]


def test_table5_has_the_original_beside_each_tolerance():
    table = paper.table5()
    assert table["tolerance"].tolist() == [0.01, 0.05, 0.1, 0.5]
    assert table["delta"].tolist() == [0.3, -0.1, -0.2, -1.0]
    assert set(table["original_top1"]) == {80.9} and set(table["original_mlu"]) == {93.8}


def test_table2_has_cells_that_are_not_legible():
    grid = paper.table2()
    assert grid.index.tolist() == ["Optimizer", "Batch Size", "Epochs", "Learning Rate", "Weight Decay", "EMA Decay"]
    assert grid.loc["Optimizer"].tolist() == ["adamW", "", ""]
    assert grid.loc["Epochs"].tolist() == ["300", "90", "200"]


def test_tradeoff_is_the_printed_shares_of_counted_originals():
    points = paper.tradeoff(paper.table5())
    assert points["original_params"].eq(86_567_656).all() and points["original_macs"].eq(17_563_828_224).all()
    assert (points["compact_params"] / 86_567_656).tolist() == pytest.approx([0.76, 0.54, 0.48, 0.31])
    assert (points["compact_macs"] / 17_563_828_224).tolist() == pytest.approx([0.58, 0.37, 0.33, 0.20])
    assert points["compact_top1"].tolist() == [81.2, 80.8, 80.7, 79.9]


def test_tradeoff_takes_the_size_of_the_images_into_account():
    scratch, probe, end_to_end = paper.tradeoff(paper.table4())["original_macs"]
    assert scratch == probe < end_to_end / 3
