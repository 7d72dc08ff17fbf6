"""What a measurement would take, against the arithmetic by hand."""

import copy
import re
from dataclasses import asdict

import pytest
from conftest import finished

from urank.reproduction import cost_estimates, profiles
from urank.reproduction.record import Record

COMMAND = ": urank reproduce --profile cifar --only cifar10/"


@pytest.fixture(scope="module")
def measured():
    """The tiny record in the place of the profile's VGG11 on CIFAR-10, as if it had taken ten hours."""
    content = copy.deepcopy(finished()[1].content)
    content["experiment"] = asdict(profiles.load_profile("cifar").find("cifar10/vgg11"))
    content["seconds"] = dict(train=30_000.0, search=6_000.0)
    for stage in content["made"].values():
        stage["device"] = "a device"
    return Record(content)


def hours(network, records):
    return float(re.search(r"about (\d+) hours of a device", cost_estimates.needs(network, "cifar10", 32, records))[1])


def test_the_same_experiment_takes_as_long_again(measured):
    needed = cost_estimates.needs("vgg11", "cifar10", 32, [measured])
    assert needed == f"a GPU, or about 10 hours of a device{COMMAND}vgg11"


def test_a_fast_device_takes_minutes(measured):
    fast = Record(measured.content | dict(seconds=dict(train=240.0)))
    assert "or about 4 minutes of a device" in cost_estimates.needs("vgg11", "cifar10", 32, [fast])


def test_a_larger_relative_takes_longer_by_its_operations(measured):
    larger, smaller = (
        cost_estimates.operations_of(profiles.load_profile("cifar").find(name))
        for name in ("cifar10/vgg19", "cifar10/vgg11")
    )
    assert hours("vgg19", [measured]) == round(10 * larger / smaller) > 20


def test_other_families_variants_and_other_images_tell_nothing(measured):
    assert cost_estimates.needs("resnet18", "cifar10", 32, [measured]) == f"a GPU{COMMAND}resnet18"
    for change in (dict(variant="isolated"), dict(dataset="digits10", data={})):
        other = Record(measured.content | dict(experiment=measured["experiment"] | change))
        assert cost_estimates.needs("vgg19", "cifar10", 32, [other]) == f"a GPU{COMMAND}vgg19"


def test_the_same_images_are_preferred(measured):
    slow = Record(
        measured.content | dict(experiment=measured["experiment"] | dict(dataset="cifar100"), seconds=dict(train=9e9))
    )
    assert hours("vgg11", [slow, measured]) == 10


def test_an_experiment_is_trained_searched_fine_tuned_and_so_is_its_baseline():
    experiment = profiles.load_profile("cifar").find("cifar10/vgg11")
    epochs = experiment.train.epochs + 2 * experiment.finetune.epochs
    passes = 3 * epochs * 50_000 + cost_estimates.search_probes("vgg11", "cifar10", 32) * 10_000
    assert cost_estimates.operations_of(experiment) == pytest.approx(2 * 152_800_000 * passes, rel=1e-3)
    widths = [64, 128, 256, 256, 512, 512, 512, 512]
    sizes = [9 * width for width in [3, *widths[:-1]]] + widths + [512, 10]  # d, then m of the convolutions
    assert cost_estimates.search_probes("vgg11", "cifar10", 32) == sum(len(bin(size - 1)) - 2 for size in sizes)


def test_gpu_hours_follow_from_the_network():
    probes = cost_estimates.search_probes("torchvision/vit_b_16", "imagenet-1k", 224)
    assert probes == 1072
    epochs = 300
    few, many = (cost_estimates.operations("torchvision/vit_b_16", "imagenet-1k", 224, count) for count in (0, epochs))
    macs = 17_563_828_224
    assert (few, many - few) == (2 * macs * probes * 50_000, 2 * 3 * epochs * 1_281_167 * macs)
    assert cost_estimates.gpu_hours("torchvision/vit_b_16", 224, 300) == pytest.approx(many / 1e14 / 3600)
