"""Load the network that a user names: from a library, from a Python function, with weights from a file."""

import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from urank.datasets.imagenet import MEAN, STD
from urank.files import read_weights
from urank.models import NETWORKS, create
from urank.models.libraries import names_of, timm_preprocessing, torchvision_preprocessing

IMAGENET = dict(size=224, resize=256, interpolation="bilinear", mean=MEAN, std=STD)


def full_name(name: str) -> str:
    """Return a network's name with its library: timm is searched first, then torchvision.

    >>> full_name("deit_tiny_patch16_224")
    'timm/deit_tiny_patch16_224'
    """
    if ":" in name or "/" in name or name in NETWORKS and name not in names_of("timm"):
        return name
    for library in ("timm", "torchvision"):
        if name in names_of(library):
            return f"{library}/{name}"
    return f"timm/{name}"  # `create` names similar ones


def load_network(name: str, weights: Path | None = None, match: str = "name") -> nn.Module:
    """Return a network in evaluation mode.

    Args:
        name: "timm/NAME", "torchvision/NAME", NAME, or "module:function" for a function that returns a network.
        weights: file of its weights (see `load_weights`); without one, a library's network has its published weights,
            and the network of a function is taken as it is.
        match: "name" or "order" (see `load_weights`).

    Raises:
        ValueError: unknown network, or weights that do not fit it.
        ConnectionError: published weights cannot be downloaded.
    """
    network = call_function(name) if ":" in name else create(full_name(name), 1000, pretrained=weights is None)
    if weights is not None:
        load_weights(network, weights, match)
    return network.eval()


def call_function(name: str) -> nn.Module:
    """Return the network that "module:function" makes; modules in the current folder are found."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}; give the name of a module and of a function in it") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name}: the function returned {type(network).__name__}, not a torch.nn.Module")
    return network


def load_weights(network: nn.Module, path: Path, match: str = "name") -> None:
    """Load weights from a .safetensors, .pt or .pth file; nothing but tensors is unpickled.

    Args:
        match: "name" requires the network's names, apart from a prefix "module."; "order" pairs the tensors of the file
            with those of the network in order and requires equal shapes.

    Raises:
        ValueError: the file is not readable, contains other objects than tensors, or does not fit the network.
    """
    own, given = network.state_dict(), read_state(path)
    if match == "order":
        given = in_order(own, given, path)
    elif match != "name":
        raise ValueError(f"match must be 'name' or 'order', got {match!r}")
    if strange := sorted(own.keys() ^ given.keys()):
        where = [f"{key!r} only in {'the network' if key in own else 'the file'}" for key in strange[:3]]
        raise ValueError(f"{path}: weights of another network ({'; '.join(where)}; {len(strange)} names differ)")
    if wrong := [key for key in own if own[key].shape != given[key].shape]:
        shapes = [f"{key!r} is {tuple(given[key].shape)}, not {tuple(own[key].shape)}" for key in wrong[:3]]
        raise ValueError(f"{path}: weights of another network ({'; '.join(shapes)}; {len(wrong)} shapes differ)")
    network.load_state_dict(given)


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a weights file by name, without the wrappers that training scripts put around them."""
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: damaged, or contains more than tensors; save the state_dict() of the network"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: not a state dict, a mapping from names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def in_order(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under the network's names, paired in order."""
    if len(own) != len(given):
        raise ValueError(f"{path}: has {len(given)} tensors, the network {len(own)}; they cannot be matched by order")
    return dict(zip(own, given.values()))


def preprocessing_of(name: str, network: nn.Module) -> dict:
    """Return the preprocessing of images that a network expects: size, resize, interpolation, mean, std.

    It is that of the library's configuration, or of the `pretrained_cfg` of a timm model that a function returned, or
    ImageNet's usual one.

    Raises:
        ValueError: the network expects images that are padded or not square.
    """
    library, _, short = full_name(name).partition("/")
    config = getattr(network, "pretrained_cfg", None)
    if isinstance(config, dict) and config:
        return timm_preprocessing(config)
    if library == "torchvision" and ":" not in name:
        return torchvision_preprocessing(torchvision.models.get_model_weights(short).DEFAULT)
    return dict(IMAGENET)
