"""What a measurement would take, against the arithmetic by hand."""

import json

import pytest
from huggingface_hub import constants

from urank.reproduction import cost_estimates, paper
from urank.reproduction.commands import reproduce
from urank.reproduction.paths import ROOT
from urank.reproduction.profiles import load_profile
from urank.reproduction.requirements import is_downloaded, requirements

VIT, DEIT = "imagenet-1k/torchvision/vit_b_16@end-to-end", "imagenet-1k/timm/deit_tiny_patch16_224"


def vit_sides(width, patch=16):
    """Patches, then four matrices a block, then the head: d and m of each."""
    block = [width, 3 * width, width, width, width, 4 * width, 4 * width, width]
    return [3 * patch**2, width] + 12 * block + [width, 1000]


def bisections(sides):
    return sum(len(bin(side - 1)) - 2 for side in sides)


def test_cifar_is_a_command():
    assert cost_estimates.needs("vgg11", "cifar10", 32) == (
        "a GPU: urank reproduce --profile cifar --only cifar10/vgg11"
    )


def test_imagenet_is_hours():
    macs, probes = 17_563_828_224, bisections(vit_sides(768))
    search, training = cost_estimates.search_hours(macs, probes), cost_estimates.training_hours(macs, epochs=300)
    needed = cost_estimates.needs("torchvision/vit_b_16", "imagenet-1k", 224)
    assert needed == f"ImageNet and about {search + training:.0f} GPU hours, {search:.2g} of them for the search"


def test_probes_are_bisections_of_every_side():
    assert cost_estimates.search_probes("torchvision/vit_b_16", 224) == bisections(vit_sides(768))


def test_search_hours_are_those_of_the_measured_searches():
    """The rate, applied to the networks that it was measured on, gives the seconds of their records."""
    records = [json.loads((ROOT / f"data/records/cifar100/vgg{depth}.json").read_text()) for depth in (16, 19)]
    assert {record["made"]["search"]["device"] for record in records} == {cost_estimates.search_rate().device}
    hours = [
        cost_estimates.search_hours(record["cost"]["original"]["macs"], len(record["plan"]["probes"]), images=10_000)
        for record in records
    ]
    assert 3600 * sum(hours) == pytest.approx(sum(record["seconds"]["search"] for record in records))
    assert "cifar100/vgg16, cifar100/vgg19" in cost_estimates.basis()


def test_training_hours_are_those_of_the_measured_training():
    """An epoch of the fastest network of the benchmark takes as long as its images/s say."""
    rows = json.loads((ROOT / "data/benchmarks/speed.json").read_text())["rows"]
    [speed] = [
        row["captured"] for row in rows if row["part"] == "training" and row["what"] == "vgg16" and "captured" in row
    ]
    macs = paper.original_cost("vgg16", "cifar10", 32).macs
    assert cost_estimates.training_rate().measured == "vgg16"
    assert 3600 * cost_estimates.training_hours(macs, epochs=1) == pytest.approx(1_281_167 / speed)


class TestRequirements:
    @pytest.fixture
    def table(self, tmp_path, monkeypatch):
        """Return the rows of the profile, with empty folders for results, images and weights."""
        monkeypatch.setenv("URANK_RUNS", str(tmp_path / "runs"))
        monkeypatch.setenv("URANK_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return lambda *names: requirements(load_profile("imagenet"), names).set_index("experiment")

    def test_are_those_of_the_network(self, table):
        row = table(DEIT).loc[DEIT]
        assert (row["layers"], row["probes"], row["GMACs"]) == ("50", str(bisections(vit_sides(192))), "1.3")
        assert row["memory, GiB"] == f"{self.memory(vit_sides(192), 5_717_416, side=224):.1f}"
        assert float(row["search, GPU h"]) == pytest.approx(
            cost_estimates.search_hours(1_253_683_200, bisections(vit_sides(192))), abs=0.05
        )
        assert row["fine-tuning, GPU h"] == f"{cost_estimates.training_hours(1_253_683_200, 300):.0f}"

    def test_follow_the_size_of_the_images(self, table):
        """The weights that were trained end to end are for 384 pixels."""
        row = table(VIT).loc[VIT]
        assert row["GMACs"] == "55.5"
        assert row["memory, GiB"] == f"{self.memory(vit_sides(768), 86_859_496, side=384):.1f}"

    def memory(self, sides, parameters, side):
        """Two networks in float32, Gram matrices in float64, 50,000 images in bytes; in GiB."""
        return (2 * 4 * parameters + 8 * sum(d**2 for d in sides[::2]) + 50_000 * 3 * side**2) / 2**30

    def test_name_what_is_missing(self, table, tmp_path):
        assert set(table(VIT, DEIT)["missing"]) == {"images (train, val), weights"}
        for label in range(1000):
            (tmp_path / "data" / "imagenet" / "train" / f"n{label:08d}").mkdir(parents=True)
        (tmp_path / "data" / "imagenet" / "val" / "n00000000").mkdir(parents=True)
        hub = tmp_path / "hub" / "models--timm--deit_tiny_patch16_224.fb_in1k"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs" / "main").write_text("abc")
        (hub / "snapshots" / "abc").mkdir(parents=True)
        (hub / "snapshots" / "abc" / "model.safetensors").touch()
        assert table(VIT, DEIT)["missing"].to_dict() == {VIT: "images (val), weights", DEIT: "images (val)"}

    def test_of_a_finished_search_are_left_out(self, table, tmp_path):
        folder = tmp_path / "runs" / "imagenet" / DEIT
        folder.mkdir(parents=True)
        for name in ("train.json", "original.safetensors", "calibrate.json", "grams.safetensors", "search.json"):
            (folder / name).touch()
        row = table(DEIT).loc[DEIT]
        assert (row["search, GPU h"], row["missing"]) == ("done", "images (train, val)")

    def test_are_part_of_a_dry_run_on_imagenet(self, table, capsys):
        reproduce(profile="imagenet", only=[DEIT], dry_run=True)
        plan, needed, notes = capsys.readouterr().out.split("\n\n")
        assert len(plan.splitlines()) == len(needed.splitlines()) == 2 and "GPU hours are for an NVIDIA H100" in notes
        assert needed.splitlines()[1].split()[:3] == [DEIT, "50", str(bisections(vit_sides(192)))]


def test_weights_of_torchvision_are_found(cached):
    assert not is_downloaded("torchvision/squeezenet1_1", "IMAGENET1K_V1")
    cached.touch()
    assert is_downloaded("torchvision/squeezenet1_1", "IMAGENET1K_V1")
