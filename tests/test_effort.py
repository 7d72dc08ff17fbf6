"""What a measurement would take, against the arithmetic by hand."""

import pytest

from urank.reproduction import cost_estimates


def test_cifar_is_a_command():
    assert cost_estimates.needs("vgg11", "cifar10", 32) == (
        "a GPU: urank reproduce --profile cifar --only cifar10/vgg11"
    )


def test_imagenet_is_hours():
    whole, search = (cost_estimates.gpu_hours("torchvision/vit_b_16", 224, epochs) for epochs in (300, 0))
    needed = cost_estimates.needs("torchvision/vit_b_16", "imagenet-1k", 224)
    assert needed == f"ImageNet and about {whole:.0f} GPU hours, {search:.2g} of them for the search"


def test_probes_are_bisections_of_every_side():
    """Patches, then four matrices a block, then the head."""
    sides = [3 * 16 * 16, 768] + 12 * [768, 3 * 768, 768, 768, 768, 3072, 3072, 768] + [768, 1000]
    assert cost_estimates.search_probes("torchvision/vit_b_16", 224) == sum(len(bin(side - 1)) - 2 for side in sides)


def test_gpu_hours_follow_from_the_network():
    probes, macs, epochs = 1072, 17_563_828_224, 300
    assert cost_estimates.search_probes("torchvision/vit_b_16", 224) == probes
    few, many = (cost_estimates.operations("torchvision/vit_b_16", 224, count) for count in (0, epochs))
    assert (few, many - few) == (2 * macs * probes * 50_000, 2 * 3 * epochs * 1_281_167 * macs)
    assert cost_estimates.gpu_hours("torchvision/vit_b_16", 224, epochs) == pytest.approx(many / 1e14 / 3600)
