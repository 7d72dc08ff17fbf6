import copy

import pytest
import torch
from conftest import briefly_trained, in_batches, structured_images
from torch import nn

from urank.calibration import accumulate_grams
from urank.factorize import decompose, project_network
from urank.layers import matrix_layers, weight_matrix
from urank.search.bisection import search_ranks
from urank.search.replay import Replay
from urank.shared_layers import Uses, separate_uses


class Recurrent(nn.Module):
    """A layer that is called three times, between two that are called once, for 3 x 8 x 8 images."""

    def __init__(self, steps=3):
        super().__init__()
        self.first, self.step, self.last = nn.Linear(192, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.steps = steps

    def forward(self, images):
        x = self.first(images.flatten(1)).tanh()
        for _ in range(self.steps):
            x = self.step(x).tanh()
        return self.last(x)


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[4].weight = model[2].weight
    return model


def at_two_places():
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), block, nn.LayerNorm(6), block)


NETWORKS = {
    "called three times": (Recurrent, ["first", "step.0", "step.1", "step.2", "last"]),
    "a shared weight": (tied, ["1", "2", "4"]),
    "a block at two places": (at_two_places, ["1", "2.0", "4.0"]),
}


def images(count=5):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(("build", "names"), NETWORKS.values(), ids=NETWORKS)
class TestEveryNetwork:
    def test_keeps_the_outputs(self, build, names):
        model = build().double().eval()
        network = separate_uses(model, images())
        with torch.no_grad():
            for x in (images(), images(2)):
                assert torch.equal(network(x), model(x))
        assert list(matrix_layers(network)) == names

    def test_is_not_changed(self, build, names):
        model = build().train()
        before = copy.deepcopy(model)
        network = separate_uses(model, images().float())
        assert repr(model) == repr(before) and model.training and network.training
        assert all(module.training for module in network.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert len(list(model.parameters())) == len(list(before.parameters()))
        weights = [layer.weight for layer in matrix_layers(network).values()]
        assert len(set(weights)) == len(weights)
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
        assert all(layer.weight.abs().sum() > 0 for layer in model.modules() if isinstance(layer, nn.Linear))

    def test_a_change_in_one_use_does_not_affect_the_others(self, build, names):
        network = separate_uses(build().double().eval(), images())
        x, layers = images(), matrix_layers(network)
        seen = {}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda layer, _, output, name=name: seen.setdefault(name, output))
        with torch.no_grad():
            network(x)
            before, changed = dict(seen), names[-2]
            layers[changed].weight += 1
            seen.clear()
            network(x)
        place = names.index(changed)
        assert all(torch.equal(seen[name], before[name]) for name in names[:place])
        assert not torch.allclose(seen[changed], before[changed])


def test_each_use_is_measured_on_its_own_inputs():
    model = Recurrent().double().eval()
    x = images(20)
    together = accumulate_grams(model, [x], progress=False)["step"]
    grams = accumulate_grams(separate_uses(model, x), [x.split(7)[0], *x.split(7)[1:]], progress=False)
    with torch.no_grad():
        X = model.first(x.flatten(1)).tanh()
        for use in range(3):
            torch.testing.assert_close(grams[f"step.{use}"], X.T @ X)
            X = model.step(X).tanh()
    torch.testing.assert_close(sum(grams[f"step.{use}"] for use in range(3)), together)


def test_each_use_is_searched_and_factored_on_its_own():
    """The replay of the search starts between two calls of one layer."""
    model = briefly_trained(Recurrent())
    network = separate_uses(model, images())
    grams = accumulate_grams(network, in_batches(*structured_images(64, seed=2), 32), progress=False)
    plan = search_ranks(network, grams, in_batches(*structured_images(60, seed=3), 20), tolerance=5, progress=False)
    assert [entry.layer for entry in plan.layers] == ["first", "step.0", "step.1", "step.2", "last"]
    projected = project_network(network, plan, grams)
    compact = decompose(projected, plan).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compact(x), projected(x), rtol=0.05, atol=0.05)
    for use in range(3):
        first, second = compact.step[use]
        assert first.out_features == plan[f"step.{use}"].rank
        W = weight_matrix(projected.step[use])
        error = W - weight_matrix(first) @ weight_matrix(second)
        assert error.square().sum() <= 1e-4 * W.square().sum() + 1e-20


def test_a_replay_from_each_use_is_exact():
    network = separate_uses(Recurrent().double().eval(), images())
    batches = [(images(), torch.zeros(5)), (images(), torch.zeros(5))]
    with torch.no_grad():
        expected = [network(x) for x, _ in batches]
        replay = Replay(network, batches)
        for name, layer in matrix_layers(network).items():
            replay.advance(layer)
            assert replay.exact
            assert all(torch.equal(logits, y) for (logits, _), y in zip(replay, expected, strict=True)), name


def test_the_count_restarts_after_an_unfinished_pass():
    model = Recurrent().double().eval()
    network = separate_uses(model, images())
    x = images()
    handle = network.step[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(x)
    handle.remove()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(network(x), model(x)) and torch.equal(copied(x), model(x))


def test_more_calls_than_expected_are_refused():
    network = separate_uses(Recurrent().double(), images())
    network.steps = 4
    with pytest.raises(ValueError, match="a layer with 3 uses was called more often"):
        network(images())


def test_a_network_may_read_the_weight_of_a_layer_that_it_calls_twice():
    class Looking(Recurrent):
        def forward(self, images):
            return super().forward(images.to(self.step.weight.dtype))

    network = separate_uses(Looking().double(), images())
    assert network(images().float()).dtype == torch.float64
    assert network.step.weight is network.step[0].weight and network.step.bias is network.step[0].bias


def test_a_frozen_weight_stays_frozen():
    model = tied()
    model[2].weight.requires_grad_(False)
    assert not separate_uses(model, images().float())[4].weight.requires_grad


def test_without_shared_layers_returns_an_equal_copy():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU()).double()
    network = separate_uses(model, images())
    assert repr(network) == repr(model) and not network._forward_pre_hooks
    assert not any(isinstance(module, Uses) for module in network.modules())
    assert network[1].weight is not model[1].weight
