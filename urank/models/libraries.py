"""Networks of torchvision and timm, with random weights or with those that the library publishes.

Weights are read as tensors and nothing else, whatever a library does by default (torchvision unpickles).
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache

import timm
import torchvision
from timm.models import PretrainedCfg
from torch import nn


@cache  # asked for every network of a profile, and timm puts its list together anew each time
def names_of(library: str) -> list[str]:
    """The image classifiers that "torchvision" or "timm" can build; timm's also with the tags of its weights."""
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    return timm.list_models() + timm.list_pretrained()


def check_library_name(library: str, name: str) -> None:
    """Refuse a name that `library` does not have, naming those that are spelled like it."""
    known = names_of(library)
    if name not in known:
        near = [f"{library}/{match}" for match in get_close_matches(name.lower(), known, n=5, cutoff=0.5)]
        hint = f"did you mean {', '.join(near)}?" if near else f"{library} has none spelled like it"
        raise ValueError(f"unknown network '{library}/{name}': {hint}")


def from_torchvision(name: str, classes: int, pretrained: bool | str, fetch: bool, options: dict) -> nn.Module:
    """torchvision.models.get_model; `pretrained` names an entry of the network's weights, True its default."""
    weights = torchvision_weights(name, pretrained) if pretrained else None
    if weights is not None:
        check_classes(f"torchvision/{name}", classes, len(weights.meta["categories"]))
        options = as_published(name, weights) | options
    with reading_tensors_only(), fetching(f"torchvision/{name}", pretrained):
        return torchvision.models.get_model(name, weights=weights if fetch else None, num_classes=classes, **options)


def as_published(name: str, weights: torchvision.models.WeightsEnum) -> dict:
    """What torchvision builds a network with only when it loads these weights into it."""
    if name.startswith("vit_"):
        return dict(image_size=min(weights.meta["min_size"]))
    own = {"googlenet": dict(transform_input=True, aux_logits=False), "inception_v3": dict(transform_input=True)}
    return own.get(name, {})


def torchvision_weights(name: str, tag: bool | str) -> torchvision.models.WeightsEnum:
    entries = torchvision.models.get_model_weights(name)
    tag = "DEFAULT" if tag is True else tag
    if tag not in entries.__members__:
        known = ", ".join(entries.__members__)
        raise ValueError(f"torchvision/{name} has no published weights {tag!r}: choose one of {known}")
    return entries[tag]


def from_timm(name: str, classes: int, pretrained: bool | str, fetch: bool, options: dict) -> nn.Module:
    """timm.create_model; `pretrained` is a tag of the network's weights, True the one in `name` or its default."""
    if pretrained:
        name = name if pretrained is True else f"{name}.{pretrained}"
        check_classes(f"timm/{name}", classes, timm_weights(name).num_classes)
    with reading_tensors_only(), fetching(f"timm/{name}", pretrained):
        return timm.create_model(name, pretrained=bool(pretrained) and fetch, num_classes=classes, **options)


def timm_weights(name: str) -> PretrainedCfg:
    check_library_name("timm", name)
    published = timm.get_pretrained_cfg(name)
    if not published.has_weights:
        raise ValueError(f"timm publishes no weights of {name!r}: create it with pretrained=False")
    return published


def preprocessing(name: str, weights: str) -> dict:
    """How published weights want images: `size`, `resize`, `interpolation`, `mean` and `std` of `read_imagenet`.

    Args:
        name: "torchvision/NAME" or "timm/NAME".
        weights: an entry of torchvision's, a tag of timm's.

    Raises:
        ValueError: there are no such weights.
    """
    library, _, network = name.partition("/")
    if library not in BUILDERS:
        raise ValueError(f"{name}: there are no published weights of it")
    if library == "torchvision":
        preset = torchvision_weights(network, weights).transforms()
        [size], [resize], interpolation = preset.crop_size, preset.resize_size, preset.interpolation.value
        mean, std = preset.mean, preset.std
    else:
        config = timm.data.resolve_data_config(pretrained_cfg=timm_weights(f"{network}.{weights}").to_dict())
        if config["crop_mode"] != "center":
            raise ValueError(f"{name}: weights {weights} want the crop {config['crop_mode']!r}, not a centred one")
        size, interpolation = config["input_size"][-1], config["interpolation"]
        resize, mean, std = math.floor(size / config["crop_pct"]), config["mean"], config["std"]
    return dict(size=size, resize=resize, interpolation=interpolation, mean=tuple(mean), std=tuple(std))


def check_classes(name: str, classes: int, published: int) -> None:
    if classes != published:
        raise ValueError(f"{name}: its published weights are of {published} classes, not {classes}: set classes to it")


BUILDERS = {"torchvision": from_torchvision, "timm": from_timm}


@contextmanager
def reading_tensors_only() -> Iterator[None]:
    """Inside the block torch.load unpickles nothing but tensors, even where its caller asks it to."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


@contextmanager
def fetching(name: str, pretrained: bool | str) -> Iterator[None]:
    """A failure to get published weights is a ConnectionError that says of which network."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # of urllib for torchvision, of huggingface_hub for timm
        damaged = str(error).startswith("invalid hash value")  # what torch.hub says of a file that came incomplete
        if not pretrained or not (isinstance(error, OSError) or damaged):
            raise
        raise ConnectionError(
            f"{name}: its published weights could not be fetched ({error}); try again with a connection, or create it "
            f"with pretrained=False"
        ) from error
