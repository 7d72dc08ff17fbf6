"""Networks, images, experiments and profiles that several test modules share."""

import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from urank.calibration import accumulate_grams
from urank.models import create
from urank.models.libraries import torchvision_weights
from urank.reproduction import profiles, stages
from urank.reproduction.experiment import Experiment
from urank.reproduction.record import Record
from urank.reproduction.runner import run
from urank.search.bisection import search_ranks
from urank.search.validation import Validation
from urank.throughput import images_per_second
from urank.training.recipe import Recipe

TINY = Experiment(
    network="vgg11",
    dataset="digits10",
    width=0.125,
    data=dict(train=400, test=100),
    train=Recipe(epochs=4, batch_size=20, lr=0.03, crop=2, flip=False, precision="float32"),
    finetune=Recipe(epochs=2, batch_size=20, lr=0.01, crop=2, flip=False, ema_decay=0.9, precision="float32"),
    tolerance=1.25,  # one image of 80
    calibration=150,
    validation=80,
    sweep=("features.8", "classifier"),
)
UNTRAINED = replace(
    TINY,
    data=dict(train=20, test=10),
    train=Recipe(epochs=0, batch_size=10),
    finetune=Recipe(epochs=0, batch_size=10),
    tolerance=100.0,
    sweep=(),
)


@functools.cache
def finished() -> tuple[Path, Record]:
    """The folder and the record of `TINY`, which runs once per session; tests only read the folder."""
    place = tempfile.TemporaryDirectory(prefix="urank-tests-")
    finished.place = place  # keeps the folder until Python ends
    return Path(place.name), run(TINY, place.name, "cpu", progress=False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_throughput_measurement(monkeypatch):
    """Measure the throughput in the last stage of a run for 20 ms per network, instead of half a second."""
    monkeypatch.setattr(stages, "images_per_second", functools.partial(images_per_second, seconds=0.02))


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The path from which torchvision reads the weights of squeezenet1_1, in an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    url = torchvision_weights("squeezenet1_1", True).url
    path = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def tf32_allowed():
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32"
    yield
    for setting, precision in zip(settings, before):
        setting.fp32_precision = precision


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Block(nn.Module):
    """A residual block that changes tensors in place wherever it can."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.norm(self.conv1(x)).relu_())
        out += x
        return out.relu_()


class Residual(nn.Module):
    """Two residual blocks between a stem and a classifier, for 3 x 8 x 8 images."""

    def __init__(self, classes: int = 4, channels: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).relu_()).mean((2, 3)))


def small_cnn(classes: int = 4) -> nn.Module:
    """Batch norm, a stride, a dilation and kernels that are not square, for 3 x 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 10, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.Conv2d(10, 8, (2, 3), stride=(1, 2), padding=(0, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 2, classes),
    )


def small_mlp(classes: int = 4) -> nn.Module:
    """Three linear layers for 3 x 8 x 8 images."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, classes)
    )


def structured_images(count: int, size: int = 8, signal: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 3, size, size) of four patterns of 4 x 4 tiles, in float64, and their labels."""
    tiles = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)
    patterns = nn.functional.interpolate(tiles, size=size)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return signal * patterns[labels] + noise, labels


def in_batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def briefly_trained(network: nn.Module, size: int = 8, signal: float = 0.4, steps: int = 40) -> nn.Module:
    """`network` in float64 and evaluation mode after a few steps of Adam on `structured_images`."""
    network = network.double().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    images, labels = structured_images(256, size, signal, seed=7)
    for step in range(steps):
        pick = torch.arange(64) + 64 * (step % 4)
        loss = nn.functional.cross_entropy(network(images[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


NETWORKS = {
    "cnn": (small_cnn, 8),
    "mlp": (small_mlp, 8),
    "residual": (Residual, 8),
    "vgg11": (lambda: create("vgg11", classes=4, width=0.125), 32),
}


@pytest.fixture(scope="session")
def searched():
    """(network, grams, validation, plan) of a small trained network; tests only read them."""
    torch.manual_seed(0)
    network = briefly_trained(small_cnn())
    grams = accumulate_grams(network, in_batches(*structured_images(128, seed=2), 64), progress=False)
    validation = Validation(in_batches(*structured_images(150, seed=3), 64))
    plan = search_ranks(network, grams, validation, tolerance=3, progress=False)
    assert any(1 < layer.rank < min(layer.d, layer.m) for layer in plan.layers)
    return network, grams, validation, plan


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a profile into another repository, which has the notebook "page"."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "page.ipynb").touch()
    monkeypatch.setattr(profiles, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(profiles, "NOTEBOOKS", tmp_path / "notebooks")

    def write(text):
        path = tmp_path / "profiles" / "mine.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of live runs, with the run of `TINY` under the profile "mine"."""
    folder = tmp_path / "kept"
    shutil.copytree(finished()[0], folder / "mine" / "digits10" / "vgg11")
    monkeypatch.setenv("URANK_RUNS", str(folder))
    return folder


@pytest.fixture
def mine(write):
    """A profile that runs `TINY`, and a second seed of it."""
    recipes = [
        f"{{epochs: {epochs}, batch_size: 20, lr: {lr}, crop: 2, flip: false, precision: float32"
        for epochs, lr in ((4, 0.03), (2, 0.01))
    ]
    tiny = (
        "network: vgg11, dataset: digits10, width: 0.125, data: {train: 400, test: 100}, tolerance: 1.25, "
        "calibration: 150, validation: 80, sweep: [features.8, classifier], "
        f"train: {recipes[0]}}}, finetune: {recipes[1]}, ema_decay: 0.9}}"
    )
    shown = "{page: [digits10/vgg11]}"
    return write(f"experiments:\n  - {{{tiny}}}\n  - {{{tiny}, seed: 1}}\nnotebooks: {shown}\n")
