import dataclasses
import platform

import numpy as np
import pandas as pd
import pytest
import torch

import urank
from benchmarks import pretrained
from benchmarks import speed as script
from urank.files import write_json
from urank.numerics import describe, has_fast_bfloat16
from urank.reproduction import benchmark_tables


def tiny(*_, **__):
    """In place of the benchmark's own networks, which take longer to train."""
    digits = urank.datasets.load("digits10", train=200, test=60)
    torch.manual_seed(0)
    model = urank.create("vgg11", 10, 0.06)
    urank.fit(model, digits, urank.Recipe(epochs=2, batch_size=20, lr=0.03, crop=2, flip=False))
    return model.eval(), digits


@pytest.fixture(scope="module")
def gram_rows():
    return list(script.grams_part(4, width=0.06))


def test_both_sides_of_every_gram_matrix_agree(gram_rows):
    frame = pd.DataFrame(gram_rows)
    assert len(frame) == 9 and frame["same"].all()
    assert frame["what"].iloc[-1] == "all of them"
    assert abs(frame["naive_seconds"].iloc[-1] - frame["naive_seconds"][:-1].sum()) <= 0.5  # each is rounded to 0.1
    assert "features.0, 3 channels, 32 x 32" in benchmark_tables.table(frame, "Gram matrix").to_html()


def test_the_naive_search_is_this_packages(monkeypatch):
    """Equal plans; the ratio is not tested, nor could it be."""
    monkeypatch.setitem(script.SEARCHES, "vgg11", (0.06, 60, 1))
    monkeypatch.setattr(script, "trained", tiny)
    rows = script.search_part("vgg11", None)
    assert [row["what"].split()[5] for row in rows] == ["exact", "fast"]
    assert all(row["same"] and row["probes"] > 30 and row["images"] == 60 for row in rows)


def test_a_search_is_compared_with_naive_passes_and_some_naive_searches():
    model, digits = tiny()
    grams = urank.accumulate_grams(model, digits.batches(digits.train), progress=False)
    batches = list(digits.batches(digits.test))
    plan, row = pretrained.timed_search(model, grams, batches, tolerance=1.7)
    assert row["probes"] == len(plan.probes) and row["layers"] == 9 and row["seconds"] > 0
    compared = dict(pretrained.searched_naively(model, grams, batches, plan, every=4))
    assert compared == {"features.0": True, "features.15": True, "classifier": True}
    other = dataclasses.replace(plan, probes=plan.probes[1:])
    assert not dict(pretrained.searched_naively(model, grams, batches, other, every=4))["features.0"]


def test_the_command_writes_what_the_page_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "trained", tiny)
    monkeypatch.setitem(script.SEARCHES, "vgg11", (0.06, 60, 1))
    script.main(only=["vgg11"], images=60, out=tmp_path / "speed.json")
    rows = benchmark_tables.benchmark(tmp_path / "speed.json")
    assert len(rows) == 2 and rows["same"].all()
    assert benchmark_tables.machines(rows) == f"Measured on {describe(torch.device('cpu'))}, torch {torch.__version__}."
    tables = [benchmark_tables.table(rows, "search", benchmark_tables.SEARCH).to_html() for _ in range(2)]
    assert tables[0].count("<tr>") == 3 and "fast in" in tables[0] and "fast in" in capsys.readouterr().out
    assert tables[0] == tables[1]  # no random identifier


def test_one_part_leaves_what_was_measured_of_others(gram_rows, monkeypatch, tmp_path):
    path = tmp_path / "speed.json"
    other = dict(only="vit", part="whole search", what="ViT", device="a GPU", torch="2.11.0")
    old = dict(only="grams", part="Gram matrix", what="of old", ratio=-1.0, device="another", torch="1.0")
    write_json(path, dict(rows=[other, old]))
    monkeypatch.setitem(script.PARTS, "grams", lambda images: gram_rows)
    monkeypatch.setitem(script.PARTS, "vit", lambda images: [])  # as where there is no GPU
    script.main(only=["vit", "grams"], images=4, out=path)
    rows = benchmark_tables.benchmark(path)
    assert len(rows) == 1 + 9 and (rows.loc[rows["part"] == "Gram matrix", "ratio"] > 0).all()
    assert benchmark_tables.machines(rows).endswith(f", torch {torch.__version__} (grams).")
    assert benchmark_tables.machines(rows).startswith("Measured on a GPU, torch 2.11.0 (vit); ")


def test_a_whole_search_is_timed():
    """The part for GPUs, on a small ViT and the CPU."""
    torch.manual_seed(0)
    model = urank.create("vit", width=0.17)
    row = script.whole_search("small", model, (3, 32, 32), 20)
    assert row["layers"] == 6 * 4 + 2 and row["probes"] > row["failed"] > 0
    assert row["device_tflops"] > 0 and row["device"] == describe(torch.device("cpu"))
    assert row["images_per_second"] == pytest.approx(row["probes"] * 20 / row["seconds"], rel=0.2)


def test_training_is_timed_in_both_arithmetics():
    rows = pd.DataFrame(script.training_part(256, ["resnet18"]))
    [row] = rows.to_dict("records")
    assert row["ratio"] == pytest.approx(row["bfloat16"] / row["float32"], rel=0.02, abs=0.01)
    auto = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    assert (row["auto"], row["batch"]) == (auto, 256)
    html = benchmark_tables.table(rows, "training", benchmark_tables.TRAINING).to_html()
    assert "resnet18" in html and row["device"] in html and "captured" not in html


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept with glibc alone")
def test_both_ways_of_freeing_are_timed():
    rows = pd.DataFrame(script.memory_part(256, ["resnet18"]))
    assert list(rows["what"].str.split(", ").str[1]) == ["evaluation", "training"]
    assert (rows["ratio"] - rows["kept"] / rows["given_back"]).abs().max() < 0.02
    html = benchmark_tables.table(rows, "memory", benchmark_tables.MEMORY).to_html()
    assert "resnet18" in html and "given back" in html


def test_training_on_a_gpu_stays_beside_training_on_a_processor(tmp_path, monkeypatch):
    """Neither measurement replaces the other."""
    path = tmp_path / "speed.json"
    monkeypatch.setitem(script.PARTS, "training", lambda images: script.training_part(images, ["resnet18"]))
    rows = dict(part="training", what="resnet18", ratio=2.0, device="a GPU", captured=9000.0)
    write_json(path, dict(rows=[rows | dict(only="gpu-training", torch="2.11.0")]))
    monkeypatch.setattr(script, "PARTS", {"training": script.PARTS["training"], "gpu-training": lambda images: []})
    script.main(images=256, out=path)
    html = benchmark_tables.table(benchmark_tables.benchmark(path), "training", benchmark_tables.TRAINING).to_html()
    assert "a GPU" in html and describe(torch.device("cpu")) in html and "captured" in html


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(Exception, match="no part grams2"):
        script.main(only=["grams2"], images=4, out=tmp_path / "speed.json")


def scaled(network, width, images, layers, seconds):
    sizes = dict(network=network, width=width, images=images, layers=layers)
    return sizes | dict(part="scaling", processor=seconds, seconds=seconds, peak_mib=images * width)


def test_exponents_are_those_of_the_powers_that_were_put_in():
    rows = pd.DataFrame(
        [scaled("a", 0.25, n, 9, 3.0 * n) for n in (100, 200, 400)]
        + [scaled("a", w, 100, 9, 300 * (w / 0.25) ** 2) for w in (0.125, 0.5)]
        + [scaled(f"b{depth}", 0.25, 100, depth, 300 * np.sqrt(depth / 9)) for depth in (16, 25)]
    )
    powers = {
        name: benchmark_tables.exponent(frame[name], frame["processor"])
        for name, frame in benchmark_tables.series(rows).items()
    }
    assert powers == pytest.approx(dict(images=1, width=2, layers=0.5))
    figure = benchmark_tables.scaling(rows)
    assert [axis.get_title() for axis in figure.axes] == [
        "grows as images$^{1.0}$", "grows as width$^{2.0}$", "grows as layers$^{0.5}$",
        "grows as images$^{1.0}$", "grows as width$^{1.0}$", "grows as layers$^{0.0}$",
    ]  # fmt: skip


def test_memory_is_left_out_where_it_is_not_known():
    rows = pd.DataFrame([scaled("a", 0.25, n, 9, n) | dict(peak_mib=0) for n in (100, 200)])
    rows = pd.concat([rows, pd.DataFrame([scaled("a", 0.5, 100, 9, 4), scaled("b", 0.25, 100, 11, 4)])])
    assert len(benchmark_tables.scaling(rows).axes) == 3


def test_a_table_without_its_rows_is_empty(tmp_path):
    path = tmp_path / "speed.json"
    write_json(path, dict(rows=[scaled("a", 1, 1, 1, 1) | dict.fromkeys(benchmark_tables.RATIOS, 1)]))
    assert "<td" not in benchmark_tables.table(benchmark_tables.benchmark(path), "delve").to_html()
