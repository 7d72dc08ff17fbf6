"""The folder of a run, and what its stages share.

Each stage writes its result into the folder: weights first, then a JSON file, each of them atomically. A stage whose
JSON file exists is not computed again, so a killed run resumes at the stage that it was in. If a file of a stage is
deleted, the stage and all that depend on it are computed again.
"""

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
from urank.numerics import describe, statistics_precision
from urank.plan import NOT_RECORDED, RankPlan
from urank.reproduction.experiment import Experiment, as_json, fresh_network, load_images
from urank.reproduction.provenance import code_digest, digest, git_state, versions
from urank.shared_layers import untie
from urank.training.fitting import fit
from urank.training.recipe import Recipe

# Files that a stage writes beside its JSON file.
PRODUCES = {
    "train": ["original.safetensors"],
    "calibrate": ["grams.safetensors"],
    "decompose": ["decomposed/weights.safetensors", "decomposed/plan.json"],
    "finetune": ["finetuned/weights.safetensors", "finetuned/plan.json"],
}
# The direct dependency of each stage. Dependencies are transitive.
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
# The settings of an experiment that each stage reads. All other settings affect training, except `baseline`, which
# adds a stage.
SETTINGS = {
    "calibrate": ["calibration"],
    "search": ["tolerance", "mode", "order", "validation"],
    "sweep": ["sweep", "validation"],
    "finetune": ["finetune"],
    "baseline": ["finetune"],
}
SMALL_IMAGE = 3 * 64 * 64  # largest number of values in a small image


class RunFolder:
    """The folder of one run, with what its stages share: the device, the images, the networks they leave.

    Args:
        experiment: the experiment.
        folder: where its stages write.
        device: where networks run.
        progress: show progress bars.
        weights: file of the weights to start training from; None for seeded ones.
        deadline: value of `time.monotonic()` by which to stop, or None.
    """

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

    def stage(self, name: str, compute: Callable[["RunFolder"], dict]) -> dict:
        """Return the result of a stage: read it if it exists, else compute it and write it with the seconds it took.

        The checkpoint is deleted last, so that a kill in between loses no epoch and no searched layer.
        """
        path = self.folder / f"{name}.json"
        missing = not is_finished(self.folder, name)
        if totals(int(missing and is_first()))[0]:  # all processes follow the first
            check_time(self.deadline, f"{self.experiment.name}: stage {name} was not started")
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
        """Delete a stage's result, the record, and the results of all stages that depend on it."""
        (self.folder / "record.json").unlink(missing_ok=True)
        self.delete(name, "json")
        for later in (later for later, read in READS.items() if read == name):
            self.delete(later, "ckpt", "begun")
            self.forget(later)

    def delete(self, name: str, *kinds: str) -> None:
        """Delete the files NAME.KIND of a stage."""
        for kind in kinds:
            (self.folder / f"{name}.{kind}").unlink(missing_ok=True)

    def begin(self, name: str) -> dict:
        """Note that this process computes a stage; return all its `makers` and the `seconds` of the earlier ones.

        A stage that is resumed from a checkpoint has several makers. The file NAME.begun is touched whenever the stage
        is started, and the checkpoint is written after each part, so their dates tell how long an earlier process took.
        """
        path, checkpoint = self.folder / f"{name}.begun", self.folder / f"{name}.ckpt"
        begun = dict(makers=[], seconds=0.0)
        if checkpoint.exists() and path.exists():
            begun = read_json(path)
            begun["seconds"] += max(0.0, checkpoint.stat().st_mtime - path.stat().st_mtime)
        this = dict(device=describe(self.device), code=code_digest(), **git_state(), versions=versions())
        begun["makers"] += [] if this in begun["makers"] else [this]
        write_json(path, begun)
        if is_first():
            path.touch()
        return begun

    @property
    def dataset(self) -> Dataset:
        """The data set, without held-out images."""
        return self._loaded()[0]

    @property
    def consulted(self) -> Split:
        """The images on which a search may count correct predictions."""
        return self._loaded()[1]

    def _loaded(self) -> tuple[Dataset, Split]:
        if self._images is None:
            dataset, held_out = load_images(self.experiment), self.experiment.holdout
            self.check_labels(labels_digest(dataset))
            self._images = hold_out(dataset, held_out) if held_out else (dataset, dataset.test)
        return self._images

    def check_labels(self, labels: str) -> None:
        """Note which images the run uses; raise an error if it used others before."""
        path = self.folder / "labels.json"
        if not path.exists():
            write_json(path, labels)
        elif read_json(path) != labels:
            raise ValueError(
                f"{path}: this run began with other {self.experiment.dataset} images (is URANK_DATA another folder?); "
                "set URANK_DATA back, or start again with --fresh"
            )

    @property
    def calibration(self) -> Batches:
        split = self.dataset.train.take(self.experiment.calibration)
        return self.batches(split.feed(self.device))  # read only once, so files need not be kept in memory

    @cached_property
    def validation(self) -> Batches:
        if self.consulted is self.dataset.test and self.experiment.validation is None:
            return self.test
        return self.batches(self.consulted.take(self.experiment.validation).to(self.device))

    @cached_property
    def test(self) -> Batches:
        return self.batches(self.dataset.test.to(self.device))

    def batches(self, split: Split | FileSplit) -> Batches:
        """Return `split` in batches, larger ones for small images on a GPU to hide launch latency."""
        small = math.prod(self.dataset.image_shape) <= SMALL_IMAGE
        return self.dataset.batches(split, 2048 if small and self.device.type == "cuda" else 256)

    def initial(self) -> nn.Module:
        """Return the network before training."""
        network = fresh_network(self.experiment)
        if self.weights is not None:
            adopt(network, read_weights(self.weights), self.dataset.image_shape)
        return network.to(self.device, memory_format=torch.channels_last)

    def original(self) -> nn.Module:
        """Return the trained network."""
        return original_network(self.experiment, self.folder).to(self.device, memory_format=torch.channels_last)

    def plan(self) -> RankPlan:
        return RankPlan.from_dict(read_json(self.folder / "search.json")["plan"])

    def grams(self) -> dict[str, Tensor]:
        return calibrated_grams(self.folder, statistics_precision(self.device)[0])

    def merged(self) -> nn.Module:
        """Return the fine-tuned network in which only those layers are split that become smaller."""
        original = self.original()
        compact = load_compact(original, self.folder / "finetuned")
        merged = merge_useless(compact, original, self.plan())
        return merged.to(self.device, memory_format=torch.channels_last)

    def cost(self, network: nn.Module) -> dict:
        """Count parameters, and MACs per image."""
        return asdict(count_cost(network, self.dataset.image_shape))

    def fit(self, network: nn.Module, recipe: Recipe, stage: str, part: str = "") -> list[dict]:
        """Fit `network`, with a checkpoint after each epoch that is deleted when the stage is finished."""
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


def is_finished(folder: Path, stage: str) -> bool:
    """Return whether all files of a stage exist."""
    return all((folder / name).exists() for name in [f"{stage}.json", *PRODUCES.get(stage, [])])


def made_by(makers: list[dict]) -> dict:
    """Describe who computed a stage: device, date, code, git commit, versions; all of them if there were several."""
    numbers = {
        package: joined(maker["versions"].get(package, "unknown") for maker in makers)
        for package in makers[-1]["versions"]
    }
    states = [maker.get("clean") for maker in makers]
    return dict(
        device=joined((maker["device"] for maker in makers), "; "),
        date=datetime.now(UTC).date().isoformat(),
        code=joined(maker["code"] for maker in makers),
        commit=joined(maker.get("commit") or NOT_RECORDED for maker in makers),
        clean=None if None in states else all(states),
        versions=numbers,
    )


def joined(words: Iterable[str], by: str = ", ") -> str:
    """Join the distinct `words`, in order."""
    return by.join(dict.fromkeys(words))


def labels_digest(dataset: Dataset) -> str:
    """Return twelve hexadecimal digits that identify the training and test labels, in order."""
    return digest(torch.cat([dataset.train.labels, dataset.test.labels]).numpy().tobytes())


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Split]:
    """Split the last `count` training images off; return the rest of the data set and these images."""
    train = dataset.train
    if count >= len(train):
        raise ValueError(f"{dataset.name}: cannot hold out {count} of {len(train)} training images")
    kept = len(train) - count
    return replace(dataset, train=train[:kept]), train[kept:]


def head_of(network: nn.Module, image_shape: tuple[int, ...]) -> str:
    """Return the path of the classifier: the last matrix layer that the forward pass of a (c, h, w) image uses."""
    return used_layers(network, one_image(network, image_shape))[-1]


def one_image(network: nn.Module, image_shape: tuple[int, ...]) -> Tensor:
    """Return a batch of one black image (1, c, h, w) on the network's device and in its precision."""
    return next(network.parameters()).new_zeros(1, *image_shape)


def adopt(network: nn.Module, weights: dict[str, Tensor], image_shape: tuple[int, ...]) -> None:
    """Load `weights` into `network`; keep its own classifier if the number of classes differs.

    Raises:
        ValueError: the weights do not fit the network, apart from the classifier.
    """
    own, head = network.state_dict(), head_of(network, image_shape)
    kept = {name: tensor for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape}
    unfit = own.keys() ^ weights.keys() | {name for name in kept if name.rpartition(".")[0] != head}
    if unfit:
        names = ", ".join(sorted(unfit))
        raise ValueError(f"the weights to start from do not fit the network, apart from its classifier {head}: {names}")
    network.load_state_dict(weights | kept)


def original_network(experiment: Experiment, folder: Path) -> nn.Module:
    """Return the trained network that the training stage left in `folder`, with a matrix for each use of a tied one."""
    network = fresh_network(experiment, fetch=False)
    network.load_state_dict(read_weights(folder / "original.safetensors"))
    untie(network)
    return network


def calibrated_grams(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return X^T X of every layer, in forward order, as the calibration stage left them in `folder`."""
    grams = read_weights(folder / "grams.safetensors", device)
    return {name: grams[name] for name in read_json(folder / "calibrate.json")["layers"]}
