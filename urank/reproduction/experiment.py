"""What is run: a network, a data set, and how it is trained, measured and fine-tuned."""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from urank import datasets, models
from urank.attention import explicit_attention
from urank.layers import matrix_layers
from urank.search.bisection import check_protocol
from urank.training.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """What is run: a network, a data set, how it is trained, measured and fine-tuned.

    Attributes:
        network, width: a name that `models.create` knows and the factor on its channels.
        dataset, data: a name that `datasets.load` knows, and options for it.
        train, finetune: recipes; `train` fits the original network, `finetune` the decomposed one.
        seed: of the weights, of the order of images and of their augmentation.
        tolerance, mode: of `search_ranks`.
        order: in which the layers are searched: "forward", as the data meet them, or "backward".
        calibration: how many training images the Gram matrices are summed over; None for all.
        validation: how many of the images that the search consults it is given; None for all.
        sweep: layers whose input-energy threshold is swept for Figure 1(b).
        variant: tells experiments of one network and data set apart; part of the name.
        pretrained: tag of the weights that the network's library publishes, which `train` goes on from; with
            `train.epochs` 0 they are taken as they are, and the images as they want them.
        start: name of the experiment whose trained network this one starts from, instead of seeded weights. Both have
            one network and width; a classifier for another number of classes starts from seeded weights. With
            `train.epochs` 0 the network is taken as it is.
        trainable: what `train` fits: "all", or "head", the last layer alone (a linear probe). Fine-tuning fits all.
        holdout: how many of the last training images are kept from training and calibration, for the search to
            consult; with 0 it consults test images, the very ones that accuracies are reported on.
        baseline: fine-tune the original network as well, by the same recipe, for a fair comparison.
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

    def __post_init__(self):
        models.check_name(self.network)
        if self.dataset not in datasets.CLASSES:
            raise ValueError(f"unknown data set {self.dataset!r}: choose one of {', '.join(datasets.CLASSES)}")
        if not isinstance(self.data, dict):
            raise ValueError(f"experiment: data holds options of the data set, not {self.data!r}")
        datasets.check_options(self.dataset, self.data)
        self._check_numbers()
        check_protocol(self.tolerance, self.mode)
        if not isinstance(self.sweep, list | tuple):
            raise ValueError(f"experiment: sweep must be a list of layer names, not {self.sweep!r}")
        object.__setattr__(self, "sweep", tuple(self.sweep))
        if missing := set(self.sweep) - layers_of(self) if self.sweep else None:
            raise ValueError(f"experiment: sweep names layers that {self.network} does not have: {', '.join(missing)}")
        self._check_choices()

    def _check_numbers(self) -> None:
        for name in ("width", "tolerance"):
            if not isinstance(getattr(self, name), int | float):  # YAML reads 1e-1 as a text: it wants 1.0e-1
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
                f"experiment: variant is a text of letters, digits, '.', '_' and '-' that does not end like a seed "
                f"(-s1), not {self.variant!r}"
            )
        if self.order not in ("forward", "backward"):
            raise ValueError(f"experiment: order is 'forward' or 'backward', not {self.order!r}")
        if not isinstance(self.start, str | None):
            raise ValueError(f"experiment: start is the name of an experiment, not {self.start!r}")
        if self.pretrained is not None:
            models.preprocessing(self.network, self.pretrained)
            if self.start is not None:
                raise ValueError("experiment: a network starts from published weights or from another experiment's")
        if self.trainable not in ("all", "head"):
            raise ValueError(f"experiment: trainable is 'all' or 'head', not {self.trainable!r}")
        if not isinstance(self.baseline, bool):
            raise ValueError(f"experiment: baseline is true or false, not {self.baseline!r}")

    @property
    def name(self) -> str:
        """Where its record lies among others: dataset/network@variant-sSEED, without an empty variant or seed 0."""
        variant, seed = f"@{self.variant}" if self.variant else "", f"-s{self.seed}" if self.seed else ""
        return f"{self.dataset}/{self.network}{variant}{seed}"

    @classmethod
    def from_dict(cls, content: dict) -> "Experiment":
        """An experiment from plain values, as `asdict` gives and a profile holds them; defaults where they are silent.

        Raises:
            ValueError: an unknown or a missing key, or a recipe that holds no fields.
        """
        try:
            recipes = {name: recipe_of(name, content[name]) for name in ("train", "finetune")}
            return cls(**content | recipes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"experiment: {error}") from error


def recipe_of(fit: str, content: object) -> Recipe:
    """The recipe of the fit called `fit` from plain values."""
    if not isinstance(content, dict):
        raise ValueError(f"experiment: {fit} holds the fields of a recipe, not {content!r}")
    return Recipe(**content)


def fresh_network(experiment: Experiment, fetch: bool = True) -> nn.Module:
    """The network of an experiment before its training, its attention made explicit.

    Args:
        fetch: False where other weights will take the place of published ones, which are then not asked for.

    Raises:
        ConnectionError: the published weights cannot be downloaded.
    """
    classes = datasets.CLASSES[experiment.dataset]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # the GPUs' generators are the caller's
        network = models.create(experiment.network, classes, experiment.width, experiment.pretrained, fetch)
    return explicit_attention(network)


def layers_of(experiment: Experiment) -> set[str]:
    """The paths of the matrix layers of its network; no weight is made."""
    with torch.device("meta"):
        return set(matrix_layers(fresh_network(experiment, fetch=False)))


def load_images(experiment: Experiment) -> datasets.Dataset:
    """The data set of an experiment, seen as the published weights that it starts from want it."""
    wanted = {} if experiment.pretrained is None else models.preprocessing(experiment.network, experiment.pretrained)
    return datasets.load(experiment.dataset, **wanted | experiment.data)


def check_start(experiment: Experiment, start: Experiment) -> None:
    """Refuse to start `experiment` from the trained network of `start` where it cannot be, or would mislead."""
    if start.name != experiment.start:
        raise ValueError(f"{experiment.name} starts from {experiment.start}, not from {start.name}")
    if (start.network, start.width) != (experiment.network, experiment.width):
        raise ValueError(
            f"{experiment.name} is a {experiment.network} of width {experiment.width:g}: it cannot start from "
            f"{start.name}, a {start.network} of width {start.width:g}"
        )
    if start.pretrained is not None:
        raise ValueError(
            f"{experiment.name} cannot start from {start.name}, whose weights are published: name these as `pretrained`"
        )
    check_held_out(experiment, start)


def check_held_out(experiment: Experiment, start: Experiment) -> None:
    """Refuse an experiment that holds out images on which `start`, from which it starts in the end, was trained."""
    if start.dataset == experiment.dataset and start.holdout < experiment.holdout:
        raise ValueError(
            f"{experiment.name} holds out {experiment.holdout} images, on some of which {start.name} was trained: let "
            "that hold out as many"
        )


def as_json(content):
    """The same content as JSON gives it back: tuples are lists."""
    if isinstance(content, dict):
        return {key: as_json(value) for key, value in content.items()}
    return [as_json(value) for value in content] if isinstance(content, list | tuple) else content
