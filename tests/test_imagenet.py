"""Image files in the layout of ImageNet, with one small picture per class in each part."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision
from sklearn.datasets import load_sample_images
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import to_pil_image

from urank import datasets, models
from urank.datasets import FileSplit, View
from urank.factorize import count_cost
from urank.files import read_weights
from urank.models import create
from urank.models.loading import preprocessing_of
from urank.reproduction import figures, stages
from urank.reproduction.experiment import Experiment, check_start
from urank.reproduction.profiles import load_profile
from urank.reproduction.record import Record
from urank.reproduction.runner import run
from urank.training.fitting import fit
from urank.training.recipe import Recipe

TIMM_WEIGHTS = [
    ("deit_tiny_patch16_224", "fb_in1k"),
    ("test_resnet", "r160_in1k"),
    ("vit_base_patch16_clip_384", "laion2b_ft_in12k_in1k"),  # images are squashed
]
CLASSES, SMALL = 1000, View(size=24, resize=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two parts with one picture per class, whose colour identifies the class."""
    folder = tmp_path_factory.mktemp("imagenet")
    for part in ("train", "val"):
        for label in range(CLASSES):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            colour = torch.tensor(colour_of(label), dtype=torch.uint8)
            to_pil_image(colour.view(3, 1, 1).expand(-1, 32, 40)).save(place / f"{part}.png")
    return folder


def colour_of(label: int) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(label / CLASSES, 1, 1))


def imagenet(folder, **options):
    return datasets.load("imagenet-1k", folder=folder, **dict(size=32, resize=32) | options)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photograph") / "china.jpg"
    to_pil_image(load_sample_images().images[0]).save(path, quality=95)
    return path


class TestFolder:
    def test_labels_follow_the_order_of_the_folders(self, folder):
        dataset = imagenet(folder)
        assert (len(dataset.train), len(dataset.test), dataset.image_shape) == (CLASSES, CLASSES, (3, 32, 32))
        for split in (dataset.train[:5], dataset.test[7:11]):
            held = split.to("cpu")
            expected = torch.tensor([colour_of(label) for label in held.labels.tolist()], dtype=torch.uint8)
            assert held.images.equal(expected.view(-1, 3, 1, 1).expand(-1, 3, 32, 32))

    def test_the_first_images_are_always_the_same_random_sample(self, folder):
        first, second = imagenet(folder), imagenet(folder)
        assert first.train.labels.equal(second.train.labels)
        assert sorted(first.train.labels.tolist()) == list(range(CLASSES))
        assert first.train.take(100).labels.float().mean() == pytest.approx(CLASSES / 2, abs=100)  # 3.5 sigma

    def test_is_found_in_the_data_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("URANK_DATA", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="imagenet/train: no such folder; put ImageNet's"):
            datasets.load("imagenet-1k")
        (tmp_path / "imagenet").symlink_to(folder)
        assert len(datasets.load("imagenet-1k").test) == CLASSES

    def test_other_classes_are_refused(self, folder, tmp_path):
        for part in ("train", "val"):
            (tmp_path / part).mkdir()
            for place in sorted((folder / part).iterdir())[part == "val" :]:
                (tmp_path / part / place.name).symlink_to(place)
        with pytest.raises(ValueError, match="the same 1000 folders.*they have 1000 and 999"):
            imagenet(tmp_path)

    @pytest.mark.parametrize("options", [dict(size=40), dict(size=0), dict(interpolation="nearest")], ids=str)
    def test_an_impossible_view_is_refused(self, folder, options):
        with pytest.raises(ValueError, match="size|interpolation"):
            imagenet(folder, **options)


class TestView:
    @pytest.mark.parametrize("name, tag", [("resnet50", "IMAGENET1K_V2"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")])
    def test_equals_the_preprocessing_of_torchvision(self, photograph, name, tag):
        preset = torchvision.models.get_model_weights(name)[tag].transforms()
        torch.testing.assert_close(self.seen(photograph, f"torchvision/{name}", tag), preset(pil_loader(photograph)))

    @pytest.mark.parametrize("name, tag", TIMM_WEIGHTS)
    def test_equals_the_preprocessing_of_timm(self, photograph, name, tag):
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(f"{name}.{tag}").to_dict())
        expected = timm.data.create_transform(**config)(pil_loader(photograph))
        torch.testing.assert_close(self.seen(photograph, f"timm/{name}", tag), expected)

    @staticmethod
    def seen(path, name, tag):
        """The input tensor that a data set makes from a photograph for the network with these weights."""
        wanted = models.preprocessing(name, tag)
        view = View(**{key: value for key, value in wanted.items() if key not in ("mean", "std")})
        split = FileSplit(np.array([str(path)]), torch.zeros(1, dtype=torch.int64), view)
        dataset = datasets.Dataset("one", 1, split, split, wanted["mean"], wanted["std"])
        return next(iter(dataset.batches(split)))[0][0].contiguous()

    def test_of_a_network_that_a_function_returned(self):
        network = timm.create_model("test_vit", pretrained=False)
        network.pretrained_cfg["crop_mode"] = "squash"
        assert preprocessing_of("mine:build", network)["squash"]

    @pytest.mark.parametrize("wrong", [dict(crop_mode="border"), dict(input_size=(3, 160, 128))], ids=str)
    def test_padded_or_oblong_images_are_refused(self, wrong):
        """No published weights for 1000 classes expect them, but a function may return such a network."""
        network = timm.create_model("test_vit", pretrained=False)
        network.pretrained_cfg |= wrong
        with pytest.raises(ValueError, match="test_vit expects crop mode .* x .* pixels; only square images"):
            preprocessing_of("mine:build", network)

    def test_unknown_weights_are_refused(self):
        with pytest.raises(ValueError, match="no published weights 'V9'"):
            models.preprocessing("torchvision/resnet50", "V9")
        with pytest.raises(ValueError, match="unknown network 'timm/resnet50.v9'"):
            models.preprocessing("timm/resnet50", "v9")

    def test_a_damaged_image_is_named(self, photograph, tmp_path):
        path = tmp_path / "cut.jpg"
        path.write_bytes(photograph.read_bytes()[:3000])
        with pytest.raises(ValueError, match="cut.jpg: not a readable image"):
            SMALL.read(path)
        path.write_text("no image")
        split = FileSplit(np.array([str(photograph), str(path)]), torch.zeros(2, dtype=torch.int64), SMALL)
        with pytest.raises(ValueError, match="cut.jpg: not a readable image"):
            split.to("cpu")

    def test_grey_images_have_three_channels(self, photograph, tmp_path):
        pil_loader(photograph).convert("L").save(tmp_path / "grey.png")
        image = SMALL.read(tmp_path / "grey.png")
        assert image.shape == (3, 24, 24) and image[0].equal(image[1]) and image[0].equal(image[2])


def test_batches_have_the_given_order(folder):
    train = imagenet(folder).train
    held, rows = train.to("cpu"), torch.randperm(CLASSES)[:90].view(9, 10)
    batches = list(train.batches(rows))
    assert len(batches) == 9
    for chosen, (images, labels) in zip(rows, batches):
        assert images.equal(held.images[chosen]) and labels.equal(held.labels[chosen])


def test_a_fit_on_files_equals_a_fit_on_images_in_memory(folder):
    files = imagenet(folder)
    files = replace(files, train=files.train[:40], test=files.test[:10])
    held = replace(files, train=files.train.to("cpu"), test=files.test.to("cpu"))
    weights = []
    for dataset in (files, held):
        torch.manual_seed(0)
        network = create("vgg11", classes=CLASSES, width=0.05)
        fit(network, replace(dataset, train=dataset.train), Recipe(epochs=2, batch_size=10, crop=3))
        weights.append(network.state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


SMALL_SIZES = dict(  # a small network of each family, by the published one
    vit=("torchvision/vit_b_16", dict(network="vit", width=1 / 6)),
    deit=(
        "timm/deit_tiny_patch16_224",
        dict(network="timm/deit_tiny_patch16_224", options=dict(img_size=32, embed_dim=32, depth=2, num_heads=2)),
    ),
    swin=(
        "timm/swin_tiny_patch4_window7_224",
        dict(
            network="timm/swin_tiny_patch4_window7_224",
            options=dict(img_size=32, window_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2]),
        ),
    ),
    resnet=("torchvision/resnet50", dict(network="resnet18", width=0.1)),
)


@pytest.mark.parametrize(("published", "small"), SMALL_SIZES.values(), ids=SMALL_SIZES)
def test_the_recipes_of_table_2_fine_tune_split_networks(published, small, folder, tmp_path, monkeypatch):
    """A small network of each family runs one epoch of the recipe that the profile has for the published one."""
    monkeypatch.setattr(stages, "BATCH_SIZES", (1,))
    recipe = replace(load_profile("imagenet").find(f"imagenet-1k/{published}").finetune, epochs=1, batch_size=100)
    data = dict(folder=str(folder), size=32, resize=32)
    protocol = dict(tolerance=100.0, calibration=30, validation=10, baseline=False)
    experiment = Experiment(
        dataset="imagenet-1k", train=Recipe(epochs=0), finetune=recipe, data=data, **small, **protocol
    )
    record = run(experiment, tmp_path / "run", "cpu", progress=False)
    [epoch] = record.history["finetune"]
    assert math.isfinite(epoch["loss"]) and 0 <= epoch["accuracy"] <= 100
    assert Record.load(tmp_path / "run" / "record.json").experiment.finetune == recipe
    before, after = (
        read_weights(tmp_path / "run" / part / "weights.safetensors") for part in ("decomposed", "finetuned")
    )
    changed = [name for name in before if not before[name].equal(after[name])]
    assert all(tensor.isfinite().all() for tensor in after.values()) and len(changed) > len(before) / 2


class TestExperiment:
    """Published weights are measured without training."""

    @pytest.fixture
    def experiment(self, folder, cached):
        torch.save(create("torchvision/squeezenet1_1", CLASSES).state_dict(), cached)
        return Experiment(
            network="torchvision/squeezenet1_1",
            pretrained="IMAGENET1K_V1",
            dataset="imagenet-1k",
            data=dict(folder=str(folder), size=48, resize=48),
            train=Recipe(epochs=0),
            finetune=Recipe(epochs=0),
            tolerance=100.0,
            calibration=30,
            validation=10,
        )

    def test_is_run_end_to_end(self, experiment, cached, tmp_path):
        record = run(experiment, tmp_path / "run", "cpu", progress=False)
        published, taken = (
            torch.load(cached, weights_only=True),
            read_weights(tmp_path / "run" / "original.safetensors"),
        )
        assert all(taken[name].equal(published[name]) for name in published | taken)
        assert len(record.plan.layers) == 26 and record.plan.total == 10 and record.calibration_images == 30
        network = create("torchvision/squeezenet1_1", CLASSES)
        assert record.cost.original.macs == count_cost(network, (3, 48, 48)).macs
        table = figures.measured_table(1, [record])
        assert table[["fine-tuned %", "change"]].isna().all(axis=None)
        assert table.loc[("imagenet-1k", "torchvision/squeezenet1_1", "measured"), "projected %"] >= 0
        cached.unlink()  # the rest of a run needs no download
        (tmp_path / "run" / "decompose.json").unlink()
        again = run(experiment, tmp_path / "run", "cpu", progress=False)
        assert again.accuracy == record.accuracy and not cached.exists()

    def test_cannot_be_the_start_of_another_experiment(self, experiment):
        """The images would be preprocessed for other weights."""
        variant = replace(experiment, pretrained=None, variant="b", start=experiment.name)
        with pytest.raises(ValueError, match="which has published weights; use `pretrained`"):
            check_start(variant, experiment)

    def test_has_one_start(self, experiment):
        with pytest.raises(ValueError, match="give pretrained or start, not both"):
            replace(experiment, start="imagenet-1k/torchvision/squeezenet1_1", variant="b")
        with pytest.raises(ValueError, match="no published weights 'V9'"):
            replace(experiment, pretrained="V9")
        with pytest.raises(ValueError, match="vgg11: there are no published weights"):
            replace(experiment, network="vgg11")
