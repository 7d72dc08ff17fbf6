"""The folder of a run, and what the stages that work in it share.

Every stage writes its result into the folder, weights first and a JSON file last, each file whole or absent. A stage
whose JSON file is there is not computed again, so a run that was killed goes on where it stopped. Where one is computed
again, because a file of it was deleted, so are those that read what it made.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from urank.datasets import Batches, Dataset, FileSplit, Split
from urank.deadline import check_time
from urank.distributed import is_first, totals, wait
from urank.factorize import count_cost, load_compact, merge_useless
from urank.files import read_json, read_weights, write_json
from urank.layers import used_layers
from urank.numerics import statistics_precision
from urank.plan import RankPlan
from urank.reproduction.experiment import Experiment, as_json, fresh_network, load_images
from urank.reproduction.provenance import code_digest, describe, versions
from urank.training.fitting import fit
from urank.training.recipe import Recipe

# The weights and matrices that a stage leaves beside its JSON file.
PRODUCES = {
    "train": ["original.safetensors"],
    "calibrate": ["grams.safetensors"],
    "decompose": ["decomposed/weights.safetensors", "decomposed/plan.json"],
    "finetune": ["finetuned/weights.safetensors", "finetuned/plan.json"],
}
# The last of the earlier stages whose result a stage reads; what that one read, it may read too.
READS = {
    "calibrate": "train",
    "search": "calibrate",
    "spectra": "search",
    "sweep": "calibrate",
    "decompose": "search",
    "finetune": "decompose",
    "baseline": "train",
    "latency": "finetune",
}
# The settings of an experiment that a stage reads. All others decide which network is trained, but for `baseline`: it
# decides whether there is such a stage.
SETTINGS = {
    "calibrate": ["calibration"],
    "search": ["tolerance", "mode", "order", "validation"],
    "sweep": ["sweep", "validation"],
    "finetune": ["finetune"],
    "baseline": ["finetune"],
}
SMALL = 3 * 64 * 64  # an image of at most so many numbers is small


class Work:
    """What the stages of one run share: the folder, the device, and the images, loaded when first needed."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        device: torch.device,
        progress: bool,
        weights: Path | None,
        deadline: float | None,
    ):
        self.experiment, self.folder, self.device, self.progress = experiment, folder, device, progress
        self.weights, self.deadline = weights, deadline
        self._images: tuple[Dataset, Split] | None = None

    def stage(self, name: str, compute: Callable[["Work"], dict]) -> dict:
        """The stage's result: read where it is there, else computed and written with the seconds it took.

        The checkpoint goes last, so that no epoch and no searched layer is lost in between.
        """
        path = self.folder / f"{name}.json"
        missing = not all(file.exists() for file in [path, *(self.folder / left for left in PRODUCES.get(name, []))])
        if totals(int(missing and is_first()))[0]:  # as the first process sees it
            check_time(self.deadline, f"{self.experiment.name} has its stage {name} ahead")
            if is_first():
                self.forget(name)
            begun, start = self.begin(name), time.perf_counter()
            result = compute(self)
            seconds = round(begun["seconds"] + time.perf_counter() - start, 1)
            write_json(path, as_json(result) | dict(made=made_by(begun["makers"]), seconds=seconds))
        if is_first():
            self.delete(name, "ckpt", "begun")
        wait()
        return read_json(path)

    def forget(self, name: str) -> None:
        """Delete an earlier result of a stage, the record that holds it, and what others made of it."""
        (self.folder / "record.json").unlink(missing_ok=True)
        self.delete(name, "json")
        for later in (later for later, read in READS.items() if read == name):
            self.delete(later, "ckpt", "begun")
            self.forget(later)

    def delete(self, name: str, *kinds: str) -> None:
        """Delete a stage's files of these endings."""
        for kind in kinds:
            (self.folder / f"{name}.{kind}").unlink(missing_ok=True)

    def begin(self, name: str) -> dict:
        """The `makers` of a stage: this process, and those that began it and left a checkpoint; the `seconds` of these.

        The file is touched whenever the stage is begun, the checkpoint is written whenever a part of it is done.
        """
        path, checkpoint = self.folder / f"{name}.begun", self.folder / f"{name}.ckpt"
        begun = dict(makers=[], seconds=0.0)
        if checkpoint.exists() and path.exists():
            begun = read_json(path)
            begun["seconds"] += max(0.0, checkpoint.stat().st_mtime - path.stat().st_mtime)
        this = dict(device=describe(self.device), code=code_digest(), versions=versions())
        begun["makers"] += [] if this in begun["makers"] else [this]
        write_json(path, begun)
        if is_first():
            path.touch()
        return begun

    @property
    def dataset(self) -> Dataset:
        """The images, without those held out."""
        return self._loaded()[0]

    @property
    def consulted(self) -> Split:
        """The images that a search may consult."""
        return self._loaded()[1]

    def _loaded(self) -> tuple[Dataset, Split]:
        if self._images is None:
            dataset, held_out = load_images(self.experiment), self.experiment.holdout
            self.check_labels(labels_digest(dataset))
            self._images = hold_out(dataset, held_out) if held_out else (dataset, dataset.test)
        return self._images

    def check_labels(self, labels: str) -> None:
        """Note which images the run sees; refuse others than it saw before."""
        path = self.folder / "labels.json"
        if not path.exists():
            write_json(path, labels)
        elif read_json(path) != labels:
            images = f"other images than {self.experiment.dataset} has now"
            raise ValueError(f"{path}: begun with {images} (another URANK_DATA?); delete its folder to start again")

    @property
    def calibration(self) -> Batches:
        split = self.dataset.train.take(self.experiment.calibration)
        return self.batches(split.feed(self.device))  # read once: files need not be held

    @cached_property
    def validation(self) -> Batches:
        if self.consulted is self.dataset.test and self.experiment.validation is None:
            return self.test
        return self.batches(self.consulted.take(self.experiment.validation).to(self.device))

    @cached_property
    def test(self) -> Batches:
        return self.batches(self.dataset.test.to(self.device))

    def batches(self, split: Split | FileSplit) -> Batches:
        """`split` in batches; a GPU gets small images by the thousand, or it would wait for each next batch."""
        small = math.prod(self.dataset.image_shape) <= SMALL
        return self.dataset.batches(split, 2048 if small and self.device.type == "cuda" else 256)

    def initial(self) -> nn.Module:
        """The network before its training."""
        network = fresh_network(self.experiment)
        if self.weights is not None:
            adopt(network, read_weights(self.weights), self.dataset.image_shape)
        return network.to(self.device, memory_format=torch.channels_last)

    def original(self) -> nn.Module:
        """The trained network."""
        return original_network(self.experiment, self.folder).to(self.device, memory_format=torch.channels_last)

    def plan(self) -> RankPlan:
        return RankPlan.from_dict(read_json(self.folder / "search.json")["plan"])

    def grams(self) -> dict[str, Tensor]:
        return calibrated_grams(self.folder, statistics_precision(self.device)[0])

    def merged(self) -> nn.Module:
        """The fine-tuned network with only the useful layers split."""
        original = self.original()
        compact = load_compact(original, self.folder / "finetuned")
        merged = merge_useless(compact, original, self.plan())
        return merged.to(self.device, memory_format=torch.channels_last)

    def cost(self, network: nn.Module) -> dict:
        """Parameters, and MACs an image."""
        return asdict(count_cost(network, self.dataset.image_shape))

    def fit(self, network: nn.Module, recipe: Recipe, stage: str, part: str = "") -> list[dict]:
        """Fit `network` with a checkpoint that is there only until the stage has ended."""
        return fit(
            network,
            self.dataset,
            recipe,
            self.experiment.seed,
            checkpoint=self.folder / f"{stage}.ckpt",
            device=self.device,
            description=f"{self.experiment.name} {stage}",
            part=part,
            deadline=self.deadline,
            progress=self.progress,
        )


def made_by(makers: list[dict]) -> dict:
    """When a stage was finished, by which code, where, and with which versions; all of them where they were several."""
    numbers = {
        package: joined(maker["versions"].get(package, "unknown") for maker in makers)
        for package in makers[-1]["versions"]
    }
    device, code = joined((maker["device"] for maker in makers), "; "), joined(maker["code"] for maker in makers)
    return dict(device=device, date=datetime.now(UTC).date().isoformat(), code=code, versions=numbers)


def joined(words: Iterable[str], by: str = ", ") -> str:
    """The different ones of `words`."""
    return by.join(dict.fromkeys(words))


def labels_digest(dataset: Dataset) -> str:
    """Twelve hexadecimal digits that change with the labels of the training and test images, and with their order."""
    return hashlib.sha256(torch.cat([dataset.train.labels, dataset.test.labels]).numpy().tobytes()).hexdigest()[:12]


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Split]:
    """`dataset` without its last `count` training images, and these."""
    train = dataset.train
    if count >= len(train):
        raise ValueError(f"{dataset.name}: of {len(train)} training images {count} cannot be held out")
    kept = len(train) - count
    return replace(dataset, train=train[:kept]), train[kept:]


def head_of(network: nn.Module, image_shape: tuple[int, ...]) -> str:
    """The path of the layer that gives the logits for images (c, h, w): the last by whose weight is multiplied."""
    return used_layers(network, one_image(network, image_shape))[-1]


def one_image(network: nn.Module, image_shape: tuple[int, ...]) -> Tensor:
    """A batch of one black image, where the network is and in its precision."""
    return next(network.parameters()).new_zeros(1, *image_shape)


def adopt(network: nn.Module, weights: dict[str, Tensor], image_shape: tuple[int, ...]) -> None:
    """Load `weights` into `network`, except a classifier for another number of classes.

    Raises:
        ValueError: the weights differ from the network's in more than the classifier's shape.
    """
    own, head = network.state_dict(), head_of(network, image_shape)
    kept = {name: tensor for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape}
    strange = own.keys() ^ weights.keys() | {name for name in kept if name.rpartition(".")[0] != head}
    if strange:
        raise ValueError(f"the weights to start from differ in more than the classifier {head}: {', '.join(strange)}")
    network.load_state_dict(weights | kept)


def original_network(experiment: Experiment, folder: Path) -> nn.Module:
    """The trained network that the training stage left in `folder`."""
    network = fresh_network(experiment, fetch=False)
    network.load_state_dict(read_weights(folder / "original.safetensors"))
    return network


def calibrated_grams(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """X^T X of every layer that the calibration stage left in `folder`, in the order of the forward pass."""
    grams = read_weights(folder / "grams.safetensors", device)
    return {name: grams[name] for name in read_json(folder / "calibrate.json")["layers"]}
