import pytest
import torch
from torch import nn

from urank.layers import matrix_layers
from urank.models import NETWORKS, create

DEPTHS = {"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize(("classes", "width"), [(10, 0.0625), (3, 0.03), (1, 0.001)])
def test_vgg_has_its_layers_and_answers_a_logit_a_class(name, classes, width):
    model = create(name, classes=classes, width=width).eval()
    layers = list(matrix_layers(model).values())
    assert len(layers) == DEPTHS[name] + 1
    assert layers[-1].in_features == max(1, round(512 * width))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def test_every_network_is_covered():
    assert set(NETWORKS) == set(DEPTHS)


def test_width_scales_every_channel_count():
    def widths(model):
        return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]

    assert widths(create("vgg11")) == [64, 128, 256, 256, 512, 512, 512, 512]
    assert widths(create("vgg11", width=0.25)) == [16, 32, 64, 64, 128, 128, 128, 128]


def test_weights_are_those_of_the_callers_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(create("vgg13", width=0.0625).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_convolutions_start_as_he_et_al_with_zero_biases():
    layer = create("vgg11", width=0.5).features[8]  # 64 to 128 channels: fan in and fan out differ
    assert layer.in_channels != layer.out_channels
    assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.02)
    assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["vgg12", "VGG11", "", "resnet"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown network.*vgg11, vgg13, vgg16, vgg19"):
        create(name)


@pytest.mark.parametrize("arguments", [dict(classes=0), dict(classes=-1), dict(width=0), dict(width=-0.5)])
def test_classes_and_width_must_be_positive(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        create("vgg11", **arguments)


@pytest.mark.parametrize("width", [float("nan"), float("inf")])
def test_a_width_that_is_no_number_is_refused(width):
    with pytest.raises(ValueError, match="width"):
        create("vgg11", width=width)
