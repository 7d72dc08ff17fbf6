"""Give each use of a shared layer its own weight, so that it has its own subspaces and its own rank.

A weight is shared if several modules hold it, or if a forward pass calls its layer several times.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from urank.layers import MatrixLayer, evaluating, matrix_layers


class Transposed(nn.Module):
    """A second use of a layer's matrix: the rows x (..., m) become x W^T (..., d), with a bias of their own.

    The parameter is that of the layer. To measure the network, pass it through `separate_uses`, which gives this use
    a layer of its own.

    Args:
        layer: a linear layer d -> m, or a 1 x 1 convolution with stride 1.
        bias: add a bias (d,), zero at first.

    >>> import torch
    >>> up = nn.Linear(2, 8)
    >>> Transposed(up)(torch.randn(5, 8)).shape
    torch.Size([5, 2])

    Raises:
        ValueError: a convolution with a larger kernel, a stride or groups.
    """

    def __init__(self, layer: MatrixLayer, bias: bool = True):
        super().__init__()
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.groups) != ((1, 1), (1, 1), 1):
            raise ValueError(f"only a 1 x 1 convolution with stride 1 and one group can be transposed, got {layer}")
        self.weight = layer.weight
        self.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[1])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        multiply = F.linear if self.weight.ndim == 2 else F.conv2d
        return multiply(x, self.weight.transpose(0, 1), self.bias)

    def separate(self) -> MatrixLayer:
        """Return a layer of its own that computes the same."""
        m, d, *kernel = self.weight.shape
        like: dict[str, Any] = dict(bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        layer = nn.Conv2d(m, d, 1, **like) if kernel else nn.Linear(m, d, **like)
        state = self.state_dict()
        layer.load_state_dict(state | dict(weight=state["weight"].transpose(0, 1)))
        return layer.train(self.training)


def separate_uses(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model` with the same outputs, in which every call of a matrix layer has its own layer.

    Each module gets its own copy of a shared parameter. A layer that is called n > 1 times in a forward pass becomes a
    `Uses` of n copies. The copies are then trained, projected and decomposed separately, so the network has more
    parameters. A single use may need a lower rank than all uses together.

    If a module reads the weight of a layer several times without calling the layer, the uses are not separated.

    Args:
        images: batch on the model's device, for one forward pass that counts the calls.

    >>> import torch
    >>> layer = nn.Linear(8, 8)
    >>> list(matrix_layers(separate_uses(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 8))))
    ['0', '2']

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
        network.register_forward_pre_hook(reset_uses)
    return network


def untie(network: nn.Module) -> None:
    """Give every use of a parameter its own: modules at several paths, transposed uses, then all other modules."""
    placed: set[nn.Module] = set()
    owned: set[nn.Parameter] = set()
    for path in [path for path, _ in network.named_modules(remove_duplicate=False)]:
        module = network.get_submodule(path)
        if module in placed and any(True for _ in module.parameters()):
            network.set_submodule(path, copy.deepcopy(module))
        placed.add(module)
    for path, module in list(network.named_modules()):
        if isinstance(module, Transposed):
            network.set_submodule(path, module.separate())
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in owned:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            owned.add(parameter)


class Uses(nn.ModuleList):
    """n copies of a layer that are called in turn; `reset_uses` starts again with the first.

    Raises:
        ValueError: a forward pass of the network calls it more than n times.
    """

    def __init__(self, layer: nn.Module, n: int):
        super().__init__(copy.deepcopy(layer) for _ in range(n))
        self.turn = 0
        self.train(layer.training)

    @property
    def next(self) -> MatrixLayer:
        """The copy that is called next."""
        return cast(MatrixLayer, self[self.turn % len(self)])

    @property
    def weight(self) -> Tensor:
        """The weight of the next copy, for networks that read it (its dtype, for example)."""
        return self.next.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the next copy."""
        return self.next.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.turn == len(self):
            raise ValueError(
                f"a layer with {len(self)} uses was called more often than in the forward pass of separate_uses: run "
                "separate_uses again with such images"
            )
        layer = self.next
        self.turn += 1
        return layer(*args, **kwargs)


def reset_uses(network: nn.Module, _: Any) -> None:
    """Start every `Uses` of the network with its first layer again (a forward pre-hook)."""
    for module in network.modules():
        if isinstance(module, Uses):
            module.turn = 0


def count_calls(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> Counter[str]:
    """Count how often a forward pass calls each layer; a layer that is not called has no entry."""
    calls: Counter[str] = Counter()
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
