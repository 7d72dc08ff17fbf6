import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, Linear, ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSameExport
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from urank.calibration import accumulate_grams
from urank.layers import (
    coverage,
    evaluating,
    input_rows,
    matrix_layers,
    set_weight_matrix,
    skipped_layers,
    used_layers,
    watch_inputs,
    weight_matrix,
)

CONVOLUTIONS = {
    "plain": dict(kernel_size=3),
    "one by one": dict(kernel_size=1),
    "padded": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "asymmetric": dict(kernel_size=(2, 3), stride=(1, 2), padding=(1, 2)),
    "dilation": dict(kernel_size=(3, 2), dilation=(2, 3), padding=2),
    "stride beyond the kernel": dict(kernel_size=2, stride=3),
    "same": dict(kernel_size=3, padding="same"),
    "same, even kernel": dict(kernel_size=(2, 4), padding="same"),
    "same, dilation": dict(kernel_size=(4, 3), padding="same", dilation=(1, 2)),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=(2, 3), padding=(1, 2), padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=2, padding_mode="replicate", stride=2),
    "circular": dict(kernel_size=(3, 2), padding=(2, 1), padding_mode="circular", dilation=2),
    "circular, same": dict(kernel_size=(2, 3), padding="same", padding_mode="circular"),
    "no bias": dict(kernel_size=3, bias=False),
}


def outputs_by_rows(layer, inputs):
    """X W + b, one row per input vector or output position."""
    Y = input_rows(layer, inputs) @ weight_matrix(layer)
    return Y if layer.bias is None else Y + layer.bias


@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 4, 3), (0,), (1,), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_rows_times_matrix(leading, bias):
    layer = nn.Linear(4, 3, bias).double()
    x = torch.randn(*leading, 4, dtype=torch.float64)
    assert input_rows(layer, x).shape == (math.prod(leading), 4)
    torch.testing.assert_close(outputs_by_rows(layer, x), layer(x).reshape(-1, 3))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_patches_times_matrix(geometry):
    layer = nn.Conv2d(3, 4, **geometry).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = layer(x)
    assert weight_matrix(layer).shape == (3 * layer.kernel_size[0] * layer.kernel_size[1], 4)
    torch.testing.assert_close(outputs_by_rows(layer, x), expected.permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Conv2d(2, 3, (2, 3)), nn.Linear(4, 3).half(), nn.Linear(4, 3).double()]
)
def test_weight_matrix_is_a_float64_copy_that_can_be_written_back(layer):
    before = layer.weight.detach().clone()
    W = weight_matrix(layer)
    assert W.dtype == torch.float64
    set_weight_matrix(layer, W)
    assert torch.equal(layer.weight, before)
    W += 1
    assert torch.equal(layer.weight, before)
    set_weight_matrix(layer, W)
    assert torch.equal(layer.weight, before + 1)
    assert layer.weight.dtype == before.dtype and layer.weight.requires_grad


@pytest.mark.parametrize("shape", [(6, 4), (24,), (4, 5), (3, 8)])
def test_set_weight_matrix_refuses_another_shape(shape):
    layer = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"4.*6"):
        set_weight_matrix(layer, torch.zeros(shape))


def test_matrix_layers_are_in_order_of_registration():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Linear(4, 2))
    assert list(matrix_layers(model)) == ["0.0", "2"]
    assert matrix_layers(model)["0.0"] is model[0][0]


def test_a_network_without_matrix_layers_is_refused():
    with pytest.raises(ValueError, match="no layer to measure"):
        matrix_layers(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(4, 4, 3, groups=2)))


def test_tied_layers_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        matrix_layers(model)


def test_one_layer_at_two_places_is_refused():
    """Factors would replace the layer in only one of the places."""
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'0' and '2' share one weight"):
        matrix_layers(nn.Sequential(layer, nn.ReLU(), layer))


def test_a_weight_tied_to_an_embedding_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share one weight: measure separate_uses"):
        matrix_layers(model)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "4 groups"),
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.Embedding(4, 4), "Embedding"),
        (nn.Linear(4, 4, dtype=torch.complex64), "complex"),
    ],
)
def test_skipped_layers_are_listed_with_a_reason(module, reason):
    model = nn.ModuleDict({"measured": nn.Linear(2, 2), "other": module, "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()})
    assert list(matrix_layers(model)) == ["measured"]
    assert list(skipped_layers(model)) == ["other"]
    assert reason in skipped_layers(model)["other"]


def test_a_layer_with_a_computed_weight_is_skipped():
    """`weight_norm` recomputes the weight in every forward pass, so a W' written into it would be lost."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert list(matrix_layers(model)) == ["1"]
    assert list(skipped_layers(model)) == ["0"]


class Forward(nn.Linear):
    """A linear layer with a custom forward."""

    def __init__(self, forward):
        super().__init__(4, 3)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def spoilt(layer, x):
    y = F.linear(x, layer.weight, layer.bias)
    y += 1
    return y


MATRICES = {
    "timm's linear": Linear(4, 3),
    "padded as in TensorFlow": Conv2dSame(3, 4, (3, 2), stride=2, dilation=(2, 1)),
    "padded by a module": Conv2dSameExport(3, 4, 3, stride=2),
    "another operand": Forward(lambda layer, x: F.linear(x.relu() / 2, layer.weight, layer.bias)),
    "by keyword": Forward(lambda layer, x: F.linear(bias=layer.bias, weight=layer.weight, input=x)),
    "in the weight's precision": Forward(lambda layer, x: F.linear(x.to(layer.weight), layer.weight, layer.bias)),
}
NO_MATRICES = {
    "standardised": (StdConv2d(3, 4, 3), "computes the weight"),
    "standardised and scaled": (ScaledStdConv2d(3, 4, 3), "computes the weight"),
    "a part of the weight": (Forward(lambda layer, x: F.linear(x[:, :2], layer.weight[:, :2])), "computes the weight"),
    "a bias of its own": (Forward(lambda layer, x: F.linear(x, layer.weight, 2 * layer.bias)), "computes the bias"),
    "no bias": (Forward(lambda layer, x: F.linear(x, layer.weight)), "computes the bias"),
    "scaled": (Forward(lambda layer, x: 2 * F.linear(x, layer.weight, layer.bias)), "more than multiply"),
    "changed in place": (Forward(spoilt), "more than multiply"),
    "its input changed": (Forward(lambda layer, x: F.linear(x.mul_(2), layer.weight, layer.bias)), "more than"),
    "a sum": (Forward(lambda layer, x: nn.Linear.forward(layer, x) + nn.Linear.forward(layer, x)), "2 calls"),
    "without its product": (Forward(lambda layer, x: x @ layer.weight.T + layer.bias), "0 calls"),
    "a view of it": (
        Forward(lambda layer, x: F.linear(x, layer.weight, layer.bias)[:, :3]),
        "more than multiply",
    ),
    "not for fewer outputs": (
        Forward(lambda layer, x: F.linear(x * layer.weight.sum(1)[2], layer.weight, layer.bias)),
        "does not run on the meta device: index 2",
    ),
    "reads a number": (
        Forward(lambda layer, x: F.linear(x * x.sum().item(), layer.weight, layer.bias)),
        "does not run on the meta device",
    ),
}


class TestCustomForward:
    @pytest.mark.parametrize("layer", MATRICES.values(), ids=MATRICES)
    def test_a_product_with_a_prepared_input_is_measured(self, layer):
        model = nn.Sequential(layer).double()
        assert list(matrix_layers(model)) == ["0"] and skipped_layers(model) == {}
        shape = (5, 4) if isinstance(layer, nn.Linear) else (2, 3, 8, 7)
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected = layer(x).movedim(1, -1).reshape(-1, layer.weight.shape[0])
            seen = []
            watch_inputs(model, x, matrix_layers(model), lambda name, *operands: seen.append(operands))
            Y = input_rows(*seen[0]) @ weight_matrix(layer) + layer.bias
        torch.testing.assert_close(Y, expected)

    @pytest.mark.parametrize(("layer", "reason"), NO_MATRICES.values(), ids=NO_MATRICES)
    def test_anything_else_is_skipped(self, layer, reason):
        model = nn.ModuleDict(dict(measured=nn.Linear(2, 2), other=layer))
        assert list(matrix_layers(model)) == ["measured"]
        assert reason in skipped_layers(model)["other"] and type(layer).__name__ in skipped_layers(model)["other"]

    def test_a_subclass_with_torchs_forward_is_not_tried_out(self):
        class Named(nn.Linear):
            def __deepcopy__(self, memo):
                raise AssertionError("no copy is needed")

        assert list(matrix_layers(nn.Sequential(Named(3, 2)))) == ["0"]

    def test_a_convolution_that_overrides_the_inner_method_is_tried_out(self):
        class Halved(nn.Conv2d):
            def _conv_forward(self, input, weight, bias):
                return super()._conv_forward(input, weight / 2, bias)

        assert "computes the weight" in skipped_layers(nn.Sequential(Halved(2, 2, 1), nn.Linear(2, 2)))["0"]

    def test_a_forward_put_on_one_layer_is_tried_out(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].forward = lambda x: 2 * nn.Linear.forward(model[0], x)
        assert list(skipped_layers(model)) == ["0"]

    def test_a_trial_leaves_the_layer_unchanged(self):
        layer = Conv2dSameExport(3, 4, 3, stride=2).train()
        matrix_layers(nn.Sequential(layer))
        assert layer.pad is None and layer.training and layer.weight.device.type == "cpu"


class Holder(nn.Module):
    """A module with parameters of its own: position embeddings, a scale, and a layer."""

    def __init__(self):
        super().__init__()
        self.positions, self.scale = nn.Parameter(torch.zeros(1, 5, 4)), nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 3)


class TestCoverage:
    def test_has_one_row_per_module_with_a_matrix(self):
        model = nn.Sequential(Holder(), nn.LSTM(3, 2), nn.BatchNorm1d(6), nn.MultiheadAttention(6, 2))
        frame = coverage(model).set_index("layer")
        assert list(frame.index) == ["0", "0.layer", "1", "3"]
        assert list(frame.params) == [20 + 4, 12 + 3, 4 * 2 * (3 + 2 + 2), 4 * (36 + 6)]
        assert list(frame.measured) == [False, True, False, False]
        assert frame.share.sum() == pytest.approx(1 - 12 / sum(p.numel() for p in model.parameters()))
        assert frame.reason["0"] == "Holder (positions) is not a linear layer or a 2-d convolution"
        assert "weight_ih_l0, weight_hh_l0" in frame.reason["1"]
        assert frame.reason["0.layer"] == ""
        assert skipped_layers(model) == dict(frame.reason[~frame.measured])

    def test_names_the_parameters_of_the_root(self):
        model = VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=12, mlp_dim=20)
        skipped = skipped_layers(model)
        assert list(skipped) == ["", "encoder", "encoder.layers.encoder_layer_0.self_attention"]
        assert "class_token" in skipped[""] and "pos_embedding" in skipped["encoder"]
        reason = skipped["encoder.layers.encoder_layer_0.self_attention"]
        assert all(word in reason for word in ("in_proj_weight", "out_proj.weight", "explicit_attention(model)"))
        assert not any("self_attention" in name for name in matrix_layers(model))

    def test_names_the_weights_of_attention_with_several_widths(self):
        reason = skipped_layers(nn.MultiheadAttention(4, 2, kdim=3))[""]
        assert all(name in reason for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))

    def test_counts_a_shared_weight_once(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        model[1].weight = model[0].weight
        assert list(coverage(model).params) == [20, 5]

    def test_with_images_finds_unused_layers(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        model.idle = nn.Linear(3, 3)
        model.forward = lambda x: model[1](model[0](x))
        frame = coverage(model, torch.randn(1, 3)).set_index("layer")
        assert frame.measured.to_dict() == {"0": True, "1": True, "idle": False}
        assert frame.reason["idle"] == "the forward pass never multiplies by its weight"

    def test_used_layers_are_in_order_of_the_forward_pass(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.body, self.idle = nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(2, 2)

            def forward(self, x):
                return self.head(self.body(x))

        assert used_layers(Backwards(), torch.zeros(1, 4)) == ["body", "head"]

    def test_counts_a_layer_whose_weight_another_module_reads(self):
        """torchvision's Swin transformer multiplies by `qkv.weight` and `proj.weight` without calling the layers."""
        model = SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3).eval()
        images = torch.randn(2, 3, 8, 8)
        frame = coverage(model, images).set_index("layer")
        assert all(frame.measured[f"features.1.0.attn.{name}"] for name in ("qkv", "proj"))
        assert "relative_position_bias_table" in frame.reason["features.1.0.attn"]
        grams = accumulate_grams(model, [images], progress=False)
        assert grams["features.1.0.attn.qkv"].shape == (8, 8)

    def test_without_matrices_is_empty(self):
        assert coverage(nn.Sequential(nn.ReLU(), nn.LayerNorm(3))).empty


def mixed_modes():
    """A network whose modules have different modes, including a module in two containers."""
    shared = nn.Dropout()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(nn.BatchNorm1d(2), shared), nn.ReLU())
    for module in (shared, model[2][0], model[3]):
        module.eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_evaluating_restores_the_mode_of_every_module_also_after_an_exception():
    model = mixed_modes()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before and len(set(before)) == 2 and torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before and torch.is_grad_enabled()
