"""Networks of torchvision and timm, with random weights or with published ones.

Published weights are always loaded with `weights_only=True`. By default, torchvision unpickles arbitrary objects.
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


@cache  # called for every network of a profile, and timm rebuilds its list on every call
def names_of(library: str) -> list[str]:
    """Return the image classifiers of "torchvision" or "timm"; those of timm also with the tags of their weights."""
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    return timm.list_models() + timm.list_pretrained()


def check_library_name(library: str, name: str) -> None:
    """Raise ValueError with similar names if `library` does not have a network called `name`."""
    known = names_of(library)
    if name not in known:
        near = [f"{library}/{match}" for match in get_close_matches(name.lower(), known, n=5, cutoff=0.5)]
        hint = f"did you mean {', '.join(near)}?" if near else f"{library} has no similar name"
        raise ValueError(f"unknown network '{library}/{name}': {hint}")


def from_torchvision(name: str, classes: int, pretrained: bool | str, fetch: bool, options: dict) -> nn.Module:
    """Build a network with `torchvision.models.get_model`; see `urank.models.create` for the arguments."""
    weights = torchvision_weights(name, pretrained) if pretrained else None
    if weights is not None:
        check_classes(f"torchvision/{name}", classes, len(weights.meta["categories"]))
        options = options_of_weights(name, weights) | options
    with reading_tensors_only(), fetching(f"torchvision/{name}", pretrained):
        return torchvision.models.get_model(name, weights=weights if fetch else None, num_classes=classes, **options)


def options_of_weights(name: str, weights: torchvision.models.WeightsEnum) -> dict:
    """Return the constructor options that torchvision only sets when it loads these weights."""
    if name.startswith("vit_"):
        return dict(image_size=min(weights.meta["min_size"]))
    own = {"googlenet": dict(transform_input=True, aux_logits=False), "inception_v3": dict(transform_input=True)}
    return own.get(name, {})


def torchvision_weights(name: str, tag: bool | str) -> torchvision.models.WeightsEnum:
    """Return the entry of torchvision's weights called `tag` (True: the default); raise ValueError if unknown."""
    entries = torchvision.models.get_model_weights(name)
    tag = "DEFAULT" if tag is True else tag
    if tag not in entries.__members__:
        known = ", ".join(entries.__members__)
        raise ValueError(f"torchvision/{name} has no published weights {tag!r}: choose one of {known}")
    return entries[tag]


def from_timm(name: str, classes: int, pretrained: bool | str, fetch: bool, options: dict) -> nn.Module:
    """Build a network with `timm.create_model`; see `urank.models.create` for the arguments."""
    if pretrained:
        name = name if pretrained is True else f"{name}.{pretrained}"
        check_classes(f"timm/{name}", classes, timm_weights(name).num_classes)
    with reading_tensors_only(), fetching(f"timm/{name}", pretrained):
        return timm.create_model(name, pretrained=bool(pretrained) and fetch, num_classes=classes, **options)


def timm_weights(name: str) -> PretrainedCfg:
    """Return timm's configuration of published weights, "NETWORK" or "NETWORK.TAG"; raise ValueError if unknown."""
    check_library_name("timm", name)
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ValueError(f"timm has no published weights for {name!r}: create it with pretrained=False")
    return published


def preprocessing(name: str, weights: str) -> dict:
    """Return the preprocessing that published weights expect, as options of `datasets.imagenet.read_imagenet`.

    Args:
        name: "torchvision/NAME" or "timm/NAME".
        weights: name of an entry of torchvision's weights, or tag of timm's.

    >>> preprocessing("timm/deit_tiny_patch16_224", "fb_in1k")["resize"]
    248

    Raises:
        ValueError: these weights do not exist, or they expect images that are padded or not square.
    """
    library, _, network = name.partition("/")
    if library not in BUILDERS:
        raise ValueError(f"{name}: there are no published weights")
    if library == "torchvision":
        return torchvision_preprocessing(torchvision_weights(network, weights))
    return timm_preprocessing(timm_weights(f"{network}.{weights}").to_dict())


def torchvision_preprocessing(weights: torchvision.models.WeightsEnum) -> dict:
    """Return the preprocessing of torchvision's weights in the form of `preprocessing`."""
    preset = weights.transforms()
    [size], [resize] = preset.crop_size, preset.resize_size
    statistics = dict(mean=tuple(preset.mean), std=tuple(preset.std))
    return dict(size=size, resize=resize, interpolation=preset.interpolation.value) | statistics


def timm_preprocessing(pretrained_cfg: dict) -> dict:
    """Return the preprocessing of a timm model's `pretrained_cfg` in the form of `preprocessing`.

    Raises:
        ValueError: images are padded or not square.
    """
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    mode, (_, height, width) = config["crop_mode"], config["input_size"]
    if mode not in ("center", "squash") or height != width:
        raise ValueError(
            f"{pretrained_cfg.get('architecture') or 'this network'} expects crop mode {mode!r} and images of "
            f"{height} x {width} pixels; only square images and the crop modes 'center' and 'squash' are supported"
        )
    statistics = dict(mean=tuple(config["mean"]), std=tuple(config["std"]))
    resize = math.floor(width / config["crop_pct"])
    squash = dict(squash=True) if mode == "squash" else {}
    return dict(size=width, resize=resize, interpolation=config["interpolation"]) | statistics | squash


def check_classes(name: str, classes: int, published: int) -> None:
    """Raise ValueError unless the published weights have this number of classes."""
    if classes != published:
        raise ValueError(f"{name}: the published weights have {published} classes, not {classes}")


BUILDERS = {"torchvision": from_torchvision, "timm": from_timm}


@contextmanager
def reading_tensors_only() -> Iterator[None]:
    """Make `torch.load` use `weights_only=True` inside the block, whatever its caller requests."""
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
    """Raise a failed download of published weights as a ConnectionError that names the network."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # from urllib (torchvision) or huggingface_hub (timm)
        damaged = str(error).startswith("invalid hash value")  # torch.hub's message for an incomplete file
        if not pretrained or not (isinstance(error, OSError) or damaged):
            raise
        raise ConnectionError(
            f"{name}: the published weights could not be downloaded ({error}); check the connection, or use "
            f"pretrained=False"
        ) from error
