import pytest
import torch
from torch import nn

from urank.layers import evaluating, input_rows, matrix_layers, set_weight_matrix, skipped_layers, weight_matrix

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
    """X W + b, a row per input vector or output position."""
    Y = input_rows(layer, inputs) @ weight_matrix(layer)
    return Y if layer.bias is None else Y + layer.bias


@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 4, 3), (0,), (1,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_rows_times_matrix(leading, bias):
    layer = nn.Linear(4, 3, bias).double()
    x = torch.randn(*leading, 4, dtype=torch.float64)
    assert input_rows(layer, x).shape == (x.numel() // 4, 4)
    torch.testing.assert_close(outputs_by_rows(layer, x), layer(x).reshape(-1, 3))


def test_a_single_vector_is_one_row():
    layer, x = nn.Linear(4, 3).double(), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(outputs_by_rows(layer, x), layer(x)[None])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_is_patches_times_matrix(geometry):
    layer = nn.Conv2d(3, 4, **geometry).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = layer(x)
    assert weight_matrix(layer).shape == (3 * layer.kernel_size[0] * layer.kernel_size[1], 4)
    torch.testing.assert_close(outputs_by_rows(layer, x), expected.permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(2, 3, (2, 3)), nn.Linear(4, 3).half()])
def test_weight_matrix_is_a_float64_copy_that_can_be_put_back(layer):
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


def test_a_float64_layer_gives_a_copy_too():
    layer = nn.Linear(4, 3).double()
    weight_matrix(layer).zero_()
    assert layer.weight.abs().sum() > 0


@pytest.mark.parametrize("shape", [(6, 4), (24,), (4, 5), (3, 8)])
def test_set_weight_matrix_refuses_another_shape(shape):
    layer = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"4.*6"):
        set_weight_matrix(layer, torch.zeros(shape))


def test_matrix_layers_come_by_path_in_order_of_registration():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Linear(4, 2))
    assert list(matrix_layers(model)) == ["0.0", "2"]
    assert matrix_layers(model)["0.0"] is model[0][0]


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no layer to measure"):
        matrix_layers(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(4, 4, 3, groups=2)))


def test_tied_layers_are_refused_by_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        matrix_layers(model)


def test_one_layer_at_two_places_is_refused_by_both():
    """Factors put in one of the places would leave the whole layer in the other."""
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'0' and '2' share one weight"):
        matrix_layers(nn.Sequential(layer, nn.ReLU(), layer))


def test_a_weight_tied_to_an_embedding_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        matrix_layers(model)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "4 groups"),
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.Embedding(4, 4), "Embedding"),
    ],
)
def test_what_is_left_out_is_reported_with_its_reason(module, reason):
    model = nn.ModuleDict({"measured": nn.Linear(2, 2), "other": module, "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()})
    assert list(matrix_layers(model)) == ["measured"]
    assert list(skipped_layers(model)) == ["other"]
    assert reason in skipped_layers(model)["other"]


def test_nothing_is_left_out_of_a_plain_network():
    assert skipped_layers(nn.Sequential(nn.Conv2d(1, 1, 1), nn.LayerNorm(3), nn.Linear(3, 3))) == {}


def test_a_computed_weight_is_not_taken_for_a_stored_one():
    """`weight_norm` recomputes the weight in every pass: a W' written into it would be lost without a word."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert list(matrix_layers(model)) == ["1"]
    assert list(skipped_layers(model)) == ["0"]


def mixed_modes():
    """Modes that differ from module to module, also between a container and what it shares with another."""
    shared = nn.Dropout()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(nn.BatchNorm1d(2), shared), nn.ReLU())
    for module in (shared, model[2][0], model[3]):
        module.eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_evaluating_gives_every_module_its_own_mode_back():
    model = mixed_modes()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before
    assert len(set(before)) == 2
    assert torch.is_grad_enabled()


def test_evaluating_gives_the_modes_back_after_an_exception():
    model = mixed_modes()
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before
    assert torch.is_grad_enabled()
