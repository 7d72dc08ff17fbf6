"""Layers that are used more than once, and how to tell their uses apart.

Two modules may share a weight, and one module may be called several times in a forward pass. A subspace and a rank
belong to a use: here each use gets a weight of its own.
"""

import copy
from collections import Counter

from torch import Tensor, nn

from urank.layers import evaluating, matrix_layers


def separate_uses(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` that computes the same and in which every call of a matrix layer is a layer.

    Modules and places that share a parameter get a copy each. A layer that one forward pass calls n > 1 times becomes
    a `Uses` of n copies. What was one weight is then trained, projected and factored as several: the network has more
    parameters, and a use may need a lower rank than all of them together. A weight that a module reads n times, without
    calling its layer, stays one.

    Args:
        images: what the network takes, on its device; run once, to count the calls.

    Raises:
        ValueError: the network has no matrix layer.
    """
    network = copy.deepcopy(model)
    untie(network)
    layers = matrix_layers(network)
    repeated = {name: n for name, n in count_calls(network, layers, images).items() if n > 1}
    for name, n in repeated.items():
        network.set_submodule(name, Uses(layers[name], n))
    if repeated:
        network.register_forward_pre_hook(restart)
    return network


def untie(network: nn.Module) -> None:
    """Give every place of a module with parameters a copy of it, then every module its own parameters."""
    placed, owned = set(), set()
    for path in [path for path, _ in network.named_modules(remove_duplicate=False)]:
        module = network.get_submodule(path)
        if module in placed and any(True for _ in module.parameters()):
            network.set_submodule(path, copy.deepcopy(module))
        placed.add(module)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in owned:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            owned.add(parameter)


class Uses(nn.ModuleList):
    """n copies of `layer` that are called in turn; `restart` on the network begins with the first again.

    Raises:
        ValueError: more calls than copies in one forward pass of the network.
    """

    def __init__(self, layer: nn.Module, n: int):
        super().__init__(copy.deepcopy(layer) for _ in range(n))
        self.turn = 0
        self.train(layer.training)

    @property
    def weight(self) -> nn.Parameter:
        """That of the copy whose turn it is, for networks that look at it (for its dtype, say)."""
        return self[self.turn % len(self)].weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self[self.turn % len(self)].bias

    def forward(self, *args, **kwargs):
        if self.turn == len(self):
            raise ValueError(f"a layer of {len(self)} uses is called once more: separate_uses saw another forward pass")
        self.turn += 1
        return self[self.turn - 1](*args, **kwargs)


def restart(network: nn.Module, _) -> None:
    """A forward pre-hook: every `Uses` of the network begins with its first layer."""
    for module in network.modules():
        if isinstance(module, Uses):
            module.turn = 0


def count_calls(model: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> Counter:
    """How often one forward pass calls each of `layers`; those it never calls are missing."""
    calls = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name])) for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls
