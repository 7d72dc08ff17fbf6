"""Experiments: a network, a data set, and how the network is trained, measured and fine-tuned."""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from urank import datasets, models
from urank.attention import explicit_attention
from urank.layers import matrix_layers
from urank.search.protocol import Protocol
from urank.shared_layers import untie
from urank.training.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """A network, a data set, and how the network is trained, measured and fine-tuned.

    Attributes:
        network, width: a name for `models.create`, and the factor on the network's channels.
        dataset, data: a name for `datasets.load`, and its options.
        train, finetune: recipes for the original network and for the decomposed one.
        seed: seed of the weights, of the order of images and of their augmentation.
        tolerance, mode: options of `search_ranks`.
        order: order in which the layers are searched: "forward" or "backward".
        calibration: number of training images in the calibration set; None for all.
        validation: number of images in the validation set of the search; None for all.
        sweep: layers whose input energy is varied for Figure 1(b).
        variant: name that distinguishes experiments on one network and data set.
        pretrained: tag of published weights to start training from. They also decide the preprocessing of images. With
            `train.epochs` 0 they are not trained further.
        start: name of an experiment whose trained network this one starts from. Both have the same network and width.
            A classifier for another number of classes starts from seeded weights.
        trainable: which layers `train` fits: "all", or "head" for the last layer alone (a linear probe). Fine-tuning
            always fits all layers.
        holdout: number of training images, the last ones, that are used for validation in the search instead of
            training and calibration. With 0 the search uses test images, on which accuracies are also reported.
        baseline: also fine-tune the original network by the same recipe, for a fair comparison.
        options: for a network of timm or torchvision, "vit" or "vit_pe", arguments of its constructor, for example its
            depth.
    """

    network: str
    dataset: str
    train: Recipe
    finetune: Recipe
    width: float = 1.0
    data: dict = field(default_factory=dict)
    seed: int = 0
    tolerance: float = 0.1
    mode: str = "joint"
    order: str = "forward"
    calibration: int | None = None
    validation: int | None = None
    sweep: tuple[str, ...] = ()
    variant: str = ""
    pretrained: str | None = None
    start: str | None = None
    trainable: str = "all"
    holdout: int = 0
    baseline: bool = True
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        models.check_name(self.network)
        if self.dataset not in datasets.CLASSES:
            raise ValueError(f"unknown data set {self.dataset!r}: choose one of {', '.join(datasets.CLASSES)}")
        for name in ("options", "data"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"experiment: {name} must be a mapping of options, got {getattr(self, name)!r}")
        datasets.check_options(self.dataset, self.data)
        self._check_numbers()
        Protocol(self.tolerance, self.mode)
        if not isinstance(self.sweep, list | tuple):
            raise ValueError(f"experiment: sweep must be a list of layer names, got {self.sweep!r}")
        object.__setattr__(self, "sweep", tuple(self.sweep))
        if missing := set(self.sweep) - layers_of(self) if self.sweep else None:
            raise ValueError(f"experiment: {self.network} has no layers {', '.join(missing)} to sweep")
        self._check_choices()

    def _check_numbers(self) -> None:
        for name in ("width", "tolerance"):
            if not isinstance(getattr(self, name), int | float):  # YAML reads 1e-1 as text; write 1.0e-1
                raise ValueError(f"experiment: {name} must be a number, got {getattr(self, name)!r}")
        if not 0 < self.width < math.inf:
            raise ValueError(f"experiment: width must be positive, got {self.width}")
        for name, least in dict(seed=0, holdout=0, calibration=1, validation=1).items():
            count, all_of_them = getattr(self, name), name in ("calibration", "validation")
            if not (type(count) is int and count >= least or count is None and all_of_them):
                raise ValueError(f"experiment: {name} must be a whole number of at least {least}, got {count!r}")

    def _check_choices(self) -> None:
        well_formed = isinstance(self.variant, str) and re.fullmatch(r"[A-Za-z0-9._-]*", self.variant)
        if not well_formed or re.search(r"-s\d+$", self.variant):
            raise ValueError(
                f"experiment: variant must consist of letters, digits, '.', '_' and '-' and not end like a seed (-s1), "
                f"got {self.variant!r}"
            )
        if self.order not in ("forward", "backward"):
            raise ValueError(f"experiment: order must be 'forward' or 'backward', got {self.order!r}")
        if not isinstance(self.start, str | None):
            raise ValueError(f"experiment: start must be the name of an experiment, got {self.start!r}")
        if self.pretrained is not None:
            models.preprocessing(self.network, self.pretrained)
            if self.start is not None:
                raise ValueError("experiment: give pretrained or start, not both")
        if self.trainable not in ("all", "head"):
            raise ValueError(f"experiment: trainable must be 'all' or 'head', got {self.trainable!r}")
        if not isinstance(self.baseline, bool):
            raise ValueError(f"experiment: baseline must be true or false, got {self.baseline!r}")

    @property
    def name(self) -> str:
        """Return dataset/network@variant-sSEED, without an empty variant and without seed 0."""
        variant, seed = f"@{self.variant}" if self.variant else "", f"-s{self.seed}" if self.seed else ""
        return f"{self.dataset}/{self.network}{variant}{seed}"

    @classmethod
    def from_dict(cls, content: dict) -> "Experiment":
        """Return the experiment from plain values, as in a profile or from `asdict`; missing ones get defaults.

        Raises:
            ValueError: an unknown key, a missing key without a default, or a recipe that is not a mapping.
        """
        try:
            recipes = {name: recipe_of(name, content[name]) for name in ("train", "finetune")}
            return cls(**content | recipes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"experiment: {error}") from error


def recipe_of(fit: str, content: object) -> Recipe:
    """Return a recipe from plain values; `fit` ("train" or "finetune") is named in errors."""
    if not isinstance(content, dict):
        raise ValueError(f"experiment: {fit} must be a mapping of recipe fields, got {content!r}")
    return Recipe(**content)


def fresh_network(experiment: Experiment, fetch: bool = True) -> nn.Module:
    """Return the network of an experiment before training, with explicit attention layers.

    Args:
        fetch: False to skip the download of published weights, when others will replace them.

    Raises:
        ConnectionError: the published weights cannot be downloaded.
    """
    classes = datasets.CLASSES[experiment.dataset]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # not the GPUs' generators
        network = models.create(
            experiment.network, classes, experiment.width, experiment.pretrained, fetch, **experiment.options
        )
    return explicit_attention(network)


def layers_of(experiment: Experiment) -> set[str]:
    """Return the paths of the network's matrix layers, without allocating weights."""
    with torch.device("meta"):
        network = fresh_network(experiment, fetch=False)
        untie(network)
        return set(matrix_layers(network))


def load_images(experiment: Experiment) -> datasets.Dataset:
    """Load the data set of an experiment, with the preprocessing of its published weights if it has any."""
    return datasets.load(experiment.dataset, **preprocessing_of(experiment))


def preprocessing_of(experiment: Experiment) -> dict:
    """Return the options of the data set: the preprocessing of published weights, and the experiment's own."""
    wanted = {} if experiment.pretrained is None else models.preprocessing(experiment.network, experiment.pretrained)
    return wanted | experiment.data


def construction(experiment: Experiment) -> str:
    """Return how the network is built, as an error names it."""
    options = f", options {experiment.options}" if experiment.options else ""
    return f"{experiment.network}, width {experiment.width:g}{options}"


def check_start(experiment: Experiment, start: Experiment) -> None:
    """Raise an error if `experiment` cannot start from the trained network of `start`, or should not."""
    if start.name != experiment.start:
        raise ValueError(f"{experiment.name} starts from {experiment.start}, not from {start.name}")
    if construction(start) != construction(experiment):
        raise ValueError(
            f"{experiment.name} ({construction(experiment)}) cannot start from {start.name} ({construction(start)})"
        )
    if start.pretrained is not None:
        raise ValueError(
            f"{experiment.name} cannot start from {start.name}, which has published weights; use `pretrained` instead"
        )
    check_held_out(experiment, start)


def check_held_out(experiment: Experiment, start: Experiment) -> None:
    """Raise an error if `start`, the first experiment in the chain, was trained on images held out here."""
    if start.dataset == experiment.dataset and start.holdout < experiment.holdout:
        raise ValueError(
            f"{experiment.name} holds out {experiment.holdout} images, but {start.name} was trained on some of them; "
            f"set its holdout to {experiment.holdout} as well"
        )


def as_json(content):
    """Return the content as JSON would return it, with lists for tuples."""
    if isinstance(content, dict):
        return {key: as_json(value) for key, value in content.items()}
    return [as_json(value) for value in content] if isinstance(content, list | tuple) else content
