"""Networks on which choices are compared: public ones whose weights the user has, and small ones trained on digits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import urank
from benchmarks.exact_and_fast import CONVOLUTIONAL, SETTINGS, Setting, trained
from urank import datasets
from urank.cli_measure import Images
from urank.datasets.imagenet import MEAN, STD
from urank.files import read_weights
from urank.measure import choose_layers, measurable
from urank.models.loading import load_network, preprocessing_of
from urank.models.resnet import ResNet
from urank.reproduction.experiment import load_images
from urank.reproduction.profiles import folder_of, load_profile
from urank.reproduction.run_folder import original_network

SMALL = SETTINGS | {"resnet18": Setting(0.5, 1000, replace(CONVOLUTIONAL, epochs=10, lr=0.1))}
SMALL |= {name: SETTINGS["vgg13"] for name in ("vgg16", "vgg19")}
RENAMED = {"conv1": "stem.0", "bn1": "stem.1", "linear": "classifier", "layer": "stage"}


@dataclass(frozen=True)
class Subject:
    """A trained network in the form in which it is measured, with its images.

    Attributes:
        data: its training and test images; the test images are those of the search.
        grams: X^T X (d, d) of every layer on the calibration set.
        validation: validation images with their labels.
        shape: (c, h, w) of an image.
    """

    name: str
    network: nn.Module
    data: datasets.Dataset
    grams: dict[str, Tensor]
    validation: urank.Validation
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, network: nn.Module, data: datasets.Dataset, images: int) -> "Subject":
        """Return a network that is calibrated on the first `images` of the training images."""
        calibration, validation = data.batches(data.train.take(images)), data.batches(data.test)
        image = next(iter(calibration))[0][:1]
        network = measurable(network, image).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        grams = urank.accumulate_grams(network, calibration, choose_layers(network, image, ["*"]), progress=False)
        return cls(name, network, data, grams, urank.Validation(validation), tuple(image.shape[1:]))


class PaddedShortcut(nn.Module):
    """The shortcut without parameters of He et al.: every second pixel, zeros on both sides of the channels."""

    def forward(self, images: Tensor) -> Tensor:
        added = images.shape[1] // 2
        return F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, added, added))


def public_resnet(name: str, folder: Path) -> Subject:
    """Return a thin ResNet for CIFAR-10 of akamaster/pytorch_resnet_cifar10, whose weights are in `folder`."""
    network = ResNet(name)
    for stage in (network.stage2, network.stage3):
        stage[0].downsample = PaddedShortcut()
    weights = read_weights(folder / "cifar_resnets" / f"{name}.safetensors")
    network.load_state_dict({renamed(key): tensor for key, tensor in weights.items()})
    data = replace(datasets.load("cifar10"), mean=MEAN, std=STD)
    return Subject.of(name, network.eval(), data, 5000)


def renamed(key: str) -> str:
    """Return the name of a public ResNet's tensor in `ResNet`.

    >>> renamed("layer1.0.conv1.weight"), renamed("conv1.weight")
    ('stage1.0.conv1.weight', 'stem.0.weight')
    """
    for old, new in RENAMED.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def public_transformer(name: str, folder: Path) -> Subject:
    """Return a network of timm with 500 calibration and 1,000 validation images of ImageNet, all in `folder`."""
    network = load_network(name, folder / "imagenet" / f"{name}.safetensors")
    view = preprocessing_of(name, network)
    calibration, validation = Images(folder / "imagenet", network, view, False, 500, 1000, False).parts
    data = datasets.Dataset("imagenet-1k", 1000, calibration, validation, view["mean"], view["std"])
    return Subject.of(name, network, data, 500)


def small(name: str, seed: int = 0) -> Subject:
    """Return a small network trained on digits, as `benchmarks.exact_and_fast` trains it."""
    network, digits = trained(name, seed, SMALL[name])
    return Subject.of(f"small {name}" + (f"-s{seed}" if seed else ""), network, digits, 1000)


PUBLIC: dict[str, Callable[[str, Path], Subject]] = {
    "resnet32": public_resnet,
    "resnet56": public_resnet,
    "deit_tiny_patch16_224": public_transformer,
}


def recorded(name: str) -> Subject:
    """Return the trained network of an experiment of the profile cifar-cpu, from its finished run."""
    experiment = load_profile("cifar-cpu").find(name)
    network = original_network(experiment, folder_of("cifar-cpu", name))
    return Subject.of(name, network, load_images(experiment), 5000)


def load(name: str, folder: Path) -> Subject:
    """Return a subject by name: a public network, "small NETWORK", or an experiment such as "cifar10/vit@small"."""
    if "/" in name:
        return recorded(name)
    if name.startswith("small "):
        return small(name.removeprefix("small "))
    return PUBLIC[name](name, folder)
