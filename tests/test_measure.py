"""`urank.measure`, the command `urank measure`, and what they refuse."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import briefly_trained, in_batches, small_cnn, structured_images
from PIL import Image
from torch import nn

import urank
from urank import cli, datasets
from urank.calibration import accumulate_grams
from urank.datasets.folders import class_numbers
from urank.factorize import count_cost, load_compact
from urank.files import read_json, write_tensors
from urank.measure import as_validation, few_images_note, measurable, measure
from urank.models.loading import full_name, load_weights
from urank.plan import RankPlan
from urank.search.bisection import search_ranks

CALIBRATION = [(images.float(), labels) for images, labels in in_batches(*structured_images(200, seed=2), 64)]
VALIDATION = [(images.float(), labels) for images, labels in in_batches(*structured_images(150, seed=3), 64)]


OTHERS = dict(budget=1, sides="input", mode="isolated", factors="paper")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return briefly_trained(small_cnn()).float()


@pytest.fixture(scope="module")
def measured(network):
    return measure(network, CALIBRATION, VALIDATION, tolerance=2.0, progress=False, factors="paper")


class TestMeasure:
    def test_is_the_search_by_hand(self, network, measured):
        grams = accumulate_grams(network, CALIBRATION, progress=False)
        assert measured.plan == search_ranks(network, grams, VALIDATION, 2.0, progress=False)
        assert measured.accuracy[:2] == (measured.plan.correct / 1.5, measured.plan.layers[-1].correct / 1.5)
        assert measured.accuracy[2] == urank.evaluate(measured.compact, VALIDATION)

    @pytest.mark.parametrize("form", ["pairs", "images", "iterator", "loader"])
    def test_takes_batches_in_any_form(self, network, measured, form):
        dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*VALIDATION)))
        forms = dict(
            pairs=VALIDATION,
            images=[images for images, _ in VALIDATION],
            iterator=iter(VALIDATION),
            loader=torch.utils.data.DataLoader(dataset, batch_size=50),
        )
        plan = measure(network, iter(CALIBRATION), forms[form], tolerance=2.0, progress=False).plan
        assert plan.counts == ("agreement" if form == "images" else "labels")
        assert form == "images" or plan.layers == measured.plan.layers

    def test_compact_network_answers_like_the_projected_one(self, measured):
        images = VALIDATION[0][0]
        with torch.no_grad():
            torch.testing.assert_close(measured.decompose()(images), measured.projected(images), rtol=1e-4, atol=1e-4)
        before, after = measured.costs
        assert after.params < before.params

    def test_keeps_a_share_of_the_parameters_without_a_search(self, network, measured):
        kept = measure(network, CALIBRATION, VALIDATION, keep=0.5, progress=False)
        before, after = kept.costs
        assert after.params <= 0.5 * before.params and not kept.plan.probes
        assert kept.accuracy[0] == measured.accuracy[0] and kept.accuracy[1] > 25
        assert "allocate_ranks(0.5, params, output); no search" in kept.summary()

    def test_keeps_a_share_of_the_network_before_its_shared_layers_were_separated(self):
        layer = nn.Linear(192, 192)
        shared = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
        images = [images for images, _ in VALIDATION]
        kept = measure(shared, CALIBRATION, images, keep=0.6, progress=False)
        assert kept.costs[1].params <= 0.6 * sum(parameter.numel() for parameter in shared.parameters())

    def test_output_factors_are_closer_to_the_outputs_at_the_same_ranks(self, network, measured):
        other = measure(network, CALIBRATION, VALIDATION, tolerance=2.0, progress=False)
        assert other.plan == measured.plan and other.costs == measured.costs
        assert other.accuracy[:2] == measured.accuracy[:2]
        images = torch.cat([images for images, _ in CALIBRATION])
        with torch.no_grad():
            errors = [(each.compact[0](images) - network[0](images)).square().sum() for each in (other, measured)]
        assert errors[0] <= errors[1]

    def test_a_budget_is_kept(self, network):
        within = measure(network, CALIBRATION, VALIDATION, budget=4, sides="output", progress=False)
        assert within.accuracy[1] >= within.accuracy[0] - 4
        assert "joint, 4 points in all, output side only" in within.summary()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(keep=0.0), "keep must be above 0"),
            *[(dict(keep=0.5) | dict([option]), "with keep there is no search") for option in OTHERS.items()],
            (dict(budget=1, mode="isolated"), "needs mode 'joint'"),
            (dict(budget=-1), "budget must be between 0 and 100"),
            (dict(sides="left"), "sides must be one of 'both', 'input', 'output'"),
            (dict(factors="best"), "factors must be 'output' or 'paper'"),
        ],
    )
    def test_refuses_options(self, network, options, message):
        with pytest.raises(ValueError, match=message):
            measure(network, CALIBRATION, VALIDATION, **options)

    def test_chooses_layers_by_pattern(self, network):
        plan = measure(network, CALIBRATION, VALIDATION, tolerance=2.0, layers=["9", "[03]"], progress=False).plan
        assert [entry.layer for entry in plan.layers] == ["0", "3", "9"]
        with pytest.raises(ValueError, match=r"no layer matches 'features\.\*' \(layers: 0, 3, 6, 9\)"):
            measure(network, CALIBRATION, VALIDATION, layers=["features.*"])

    def test_measures_attention_and_each_use_of_a_shared_layer(self):
        layer = nn.Linear(192, 192)
        shared = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
        assert list(dict(measurable(shared, CALIBRATION[0][0]).named_children())) == ["0", "1", "2", "3"]
        plan = measure(shared, CALIBRATION, [images for images, _ in VALIDATION], layers=["3"], progress=False).plan
        assert [entry.layer for entry in plan.layers] == ["3"]

    def test_summary_and_files(self, measured, tmp_path):
        measured.save(tmp_path / "out", "a <small> network")
        names = {"plan.json", "results.json", "layers.csv", "snapshot.svg", "snapshot.png", "report.html"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        assert RankPlan.load(tmp_path / "out" / "plan.json") == measured.plan
        page = (tmp_path / "out" / "report.html").read_text()
        assert "a &lt;small&gt; network" in page and "http" not in page.replace("http://www.w3.org", "")
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["mlu"] == [measured.plan.weight_mlu, measured.plan.mlu] and results["device"]
        assert results["params"][1] < results["params"][0] == count_cost(measured.network, (3, 8, 8)).params
        text = measured.summary()
        assert f"MLU         {100 * measured.plan.mlu:.1f} %" in text and "may lose 3 of 150 images" in text

    @pytest.mark.parametrize(("tolerance", "total", "note"), [(0.1, 5000, False), (0.1, 4999, True), (0.0, 10, False)])
    def test_notes_when_a_projection_may_lose_fewer_than_five_images(self, tolerance, total, note):
        assert bool(few_images_note(tolerance, total)) == note

    def test_large_data_sets_are_on_the_device_in_every_order(self, monkeypatch):
        monkeypatch.setattr(urank.search.validation, "MAX_FLOAT_BYTES", 0)
        digits = datasets.load("digits10", train=20, test=30)
        validation = as_validation(nn.Linear(2, 2, device="meta"), digits.batches(digits.test, 8))
        assert isinstance(validation.batches, datasets.Batches)
        for order in (torch.arange(30), torch.arange(30).flip(0)):
            validation = validation.in_order(order)
            assert {part.device.type for batch in validation for part in batch} == {"meta"}

    def test_no_batch(self, network):
        with pytest.raises(ValueError, match="no batch of images"):
            measure(network, [], VALIDATION)


MODULE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 4))

def in_place():
    class Centre(nn.Module):
        def forward(self, images):
            return images.sub_(images.mean())
    return nn.Sequential(Centre(), build())

def timm_network(crop_mode):
    network = build()
    network.pretrained_cfg = dict(architecture="mine", input_size=(3, 16, 16), crop_pct=1.0, crop_mode=crop_mode)
    return network

def padded():
    return timm_network("border")

def squashed():
    return timm_network("squash")

def three_numbers():
    return 1, 2, 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module that builds a network for 16 x 16 images of four classes, its weights, and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(MODULE, namespace)
    write_tensors(tmp_path / "weights.safetensors", dict(namespace["build"]().state_dict()))
    generator = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 80, (16, 16, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / str(label) / f"{number}.png")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys, folder):
    """Run `urank measure` in this process; exit code (1 where a sentence was printed), stdout and stderr."""

    def run(*arguments, model="mine:build"):
        options = [
            "--input-size",
            "16",
            "--crop-pct",
            "1",
            "--calibration",
            "16",
            "--tolerance",
            "10",
            "--device",
            "cpu",
        ]
        line = ["urank", "measure", model, "--images", "images", "--weights", "weights.safetensors", "--out", "out"]
        monkeypatch.setattr(sys, "argv", [*line, *options, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        out, err = capsys.readouterr()
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code or 0, out, err)

    return run


class TestCommand:
    def test_measures_and_reports(self, command, folder):
        code, out, _ = command("--decompose")
        assert code == 0
        assert "mine:build: 2 layers with 100.0 % of the parameters" in out and "probes: at most" in out
        names = {path.name for path in (folder / "out").iterdir()}
        assert names >= {
            "plan.json",
            "results.json",
            "layers.csv",
            "snapshot.svg",
            "snapshot.png",
            "report.html",
            "compact",
        }
        namespace: dict = {}
        exec(MODULE, namespace)
        compact = load_compact(namespace["build"](), folder / "out" / "compact")
        assert compact(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
        assert f"MLU         {100 * RankPlan.load(folder / 'out' / 'plan.json').mlu:.1f} %" in out

    def test_squashes_images_for_a_network_that_expects_it(self, command, folder):
        assert command(model="mine:squashed")[0] == 0
        assert read_json(folder / "out" / "measurement.json")["preprocessing"]["squash"]

    def test_a_dry_run_only_says_what_would_be_measured(self, command, folder):
        code, out, _ = command("--dry-run")
        assert code == 0 and "16 for calibration, 24 for validation" in out and not (folder / "out").exists()

    def test_resumes_after_the_last_finished_layer(self, command, folder):
        code, out, err = command("--time-budget", "0")
        assert code == 75 and "1 of 2 layers left" in out + err
        assert len(read_json(folder / "out" / "search.json")["plan"]["layers"]) == 1
        code, _, _ = command()
        assert code == 0 and len(RankPlan.load(folder / "out" / "plan.json").layers) == 2

    def test_agreement_needs_no_labels(self, command, folder):
        for path in (folder / "images").glob("*/*.png"):
            path.rename(folder / "images" / f"{path.parent.name}-{path.name}")
        code, _, _ = command("--agreement")
        assert code == 0 and RankPlan.load(folder / "out" / "plan.json").counts == "agreement"

    def test_train_and_val_folders_are_calibration_and_validation(self, command, folder):
        (folder / "images").rename(folder / "val")
        (folder / "images").mkdir()
        (folder / "val").rename(folder / "images" / "val")
        (folder / "images" / "train" / "2").mkdir(parents=True)
        (folder / "images" / "val" / "2" / "0.png").rename(folder / "images" / "train" / "2" / "0.png")
        code, out, _ = command("--dry-run")
        assert code == 0 and "1 for calibration, 39 for validation" in out

    def test_weights_may_be_matched_by_order(self, command, folder):
        renamed = {f"layer{i}": t for i, t in enumerate(torch.load(torch_file(folder), weights_only=True).values())}
        torch.save(dict(state_dict=renamed), folder / "other.pth")
        assert command("--weights", "other.pth", "--match", "order", "--dry-run")[0] == 0
        code, _, err = command("--weights", "other.pth", "--dry-run")
        assert code == 1 and "weights of another network ('0.bias' only in the network; '0.weight' only" in err


def torch_file(folder):
    """The folder's weights as a .pt file."""
    namespace: dict = {}
    exec(MODULE, namespace)
    torch.save(namespace["build"]().state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


class Evil:
    def __reduce__(self):
        return print, ("executed",)


class TestBadInput:
    """One sentence each, and nothing lost."""

    @pytest.mark.parametrize(
        ("arguments", "model", "said"),
        [
            (["--images", "nowhere"], "mine:build", "nowhere: no such folder"),
            (["--input-size", "32"], "mine:build", "does not accept images of 32 pixels"),
            (["--calibration", "40"], "mine:build", "40 images are too few for 40 calibration images"),
            (["--layers", "x*"], "mine:build", "no layer matches 'x*'"),
            (["--weights", "none.pt"], "mine:build", "none.pt"),
            (["--weights", "mine.py"], "mine:build", "mine.py: damaged, or contains more than tensors"),
            (["--mean", "0.5"], "mine:build", "expected three numbers separated by commas, got '0.5'"),
            (["--crop-pct", "1.5"], "mine:build", "--crop-pct must be above 0 and at most 1, got 1.5"),
            (["--interpolation", "cubic"], "mine:build", "interpolation must be 'bilinear' or 'bicubic', got 'cubic'"),
            (["--match", "shape"], "mine:build", "match must be 'name' or 'order', got 'shape'"),
            (["--mode", "both"], "mine:build", "mode must be 'joint' or 'isolated', got 'both'"),
            (["--evaluation", "auto"], "mine:build", "evaluation must be 'exact' or 'fast', got 'auto'"),
            (["--tolerance", "-1"], "mine:build", "tolerance must be between 0 and 100"),
            (["--device", "quantum"], "mine:build", "device 'quantum' is not available"),
            ([], "mine:nothing", "mine:nothing: module 'mine' has no attribute 'nothing'"),
            ([], "mine:three_numbers", "the function returned tuple, not a torch.nn.Module"),
            ([], "mine:in_place", "weights of another network"),
            ([], "mine:padded", "mine expects crop mode 'border'"),
            ([], "vit_tiny_patch16_225", "did you mean"),
        ],
    )
    def test_of_arguments(self, command, folder, arguments, model, said):
        code, _, err = command(*arguments, model=model)
        assert code == 1 and said in err and err.count("\n") == 1, err
        assert not (folder / "out" / "plan.json").exists()

    def test_a_folder_that_is_no_class(self, command, folder):
        (folder / "images" / "3").rename(folder / "images" / "cat")
        assert command("--dry-run")[0] == 0  # one folder per class
        (folder / "images" / "extra").mkdir()
        code, _, err = command()
        assert code == 1 and "'cat' is not a class of this network (4 classes, 5 folders)" in err

    def test_an_unreadable_image(self, command, folder):
        (folder / "images" / "1" / "3.png").write_bytes(b"no image")
        code, _, err = command()
        assert code == 1 and f"{folder / 'images' / '1' / '3.png'}"[-14:] in err and "not a readable image" in err
        code, out, _ = command("--skip-unreadable")
        assert code == 0 and "1 of 40 images are unreadable and left out" in out

    def test_pickled_code_in_a_weights_file(self, command, folder):
        (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
        code, out, err = command("--weights", "evil.pt")
        assert code == 1 and "executed" not in out and "evil.pt: " in err

    def test_weights_with_nan(self, command, folder):
        state = torch.load(torch_file(folder), weights_only=True)
        state["0.bias"][0] = torch.nan
        torch.save(state, folder / "nan.pt")
        code, _, err = command("--weights", "nan.pt")
        assert code == 1 and "NaN" in err

    def test_a_folder_with_another_measurement(self, command, folder):
        assert command()[0] == 0
        before = (folder / "out" / "plan.json").read_bytes()
        code, _, err = command("--tolerance", "20")
        assert code == 1 and "out: contains another measurement (other tolerance); choose another --out" in err
        assert (folder / "out" / "plan.json").read_bytes() == before
        assert json.loads((folder / "out" / "measurement.json").read_text())["tolerance"] == 10


def test_synsets_and_class_numbers_name_classes(tmp_path):
    assert class_numbers(["n01440764", "n15075141"], 1000, tmp_path) == [0, 999]
    assert class_numbers(["7", "0"], 10, tmp_path) == [7, 0]
    with pytest.raises(ValueError, match="'cat' is not a class"):
        class_numbers(["n01440764", "cat"], 1000, tmp_path)


def test_a_name_may_leave_out_its_library():
    assert full_name("deit_tiny_patch16_224") == "timm/deit_tiny_patch16_224"
    assert full_name("googlenet") == "torchvision/googlenet"
    assert full_name("vgg11/mine:f") == "vgg11/mine:f"


def test_weights_of_other_shapes_are_named(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: weights of another network \('weight' is \(2, 3\), not \(2, 4\)"):
        load_weights(nn.Linear(4, 2), tmp_path / "other.pt")
