"""One network on one data set, end to end: train, calibrate, search, decompose, fine-tune, time, record.

An experiment may start from the network that another one trained.

Every stage writes its result into the experiment's folder, weights first and a JSON file last, each file whole or
absent. A stage whose JSON file is there is not computed again, so a run that was killed goes on where it stopped.
"""

import copy
import hashlib
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from urank import datasets, models
from urank.datasets import SIDE, Batches, Dataset, Split
from urank.decompose import count_cost, decompose, load_compact, merge_useless, project_network, save_compact
from urank.distributed import is_first, join, own_device, totals, wait
from urank.files import read_json, read_weights, write_json, write_tensors, write_weights
from urank.latency import images_per_second
from urank.layers import evaluating, matrix_layers, set_weight_matrix, weight_matrix
from urank.plan import RankPlan
from urank.precision import has_fast_bfloat16
from urank.replay import Replay
from urank.search import check_protocol, search_ranks
from urank.subspaces import Spectrum, accumulate_grams, dimension_for_energy, output_gram
from urank.training import Recipe, check_time, evaluate, fit, last_layer
from urank.utilization import project_weight

ENERGIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
# Modules of the package's top level that no measurement depends on.
PRESENTATION = ("figures.py", "paper.py", "profiles.py", "cli.py", "__init__.py", "__main__.py")
# The weights and matrices that a stage leaves beside its JSON file.
PRODUCES = {
    "train": ["original.safetensors"],
    "calibrate": ["grams.safetensors"],
    "decompose": ["decomposed/weights.safetensors", "decomposed/plan.json"],
    "finetune": ["finetuned/weights.safetensors", "finetuned/plan.json"],
}
BATCH_SIZES = (1, 256)  # at which the networks are timed
VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True)
class Experiment:
    """What is run: a network, a data set, how it is trained, measured and fine-tuned.

    Attributes:
        network, width: a name that `models.create` knows and the factor on its channels.
        dataset, data: a name that `datasets.load` knows, and options for it.
        train, finetune: recipes; `train` fits the original network, `finetune` the decomposed one.
        seed: of the weights, of the order of images and of their augmentation.
        tolerance, mode: of `search_ranks`.
        calibration: how many training images the Gram matrices are summed over; None for all.
        validation: how many of the images that the search consults it is given; None for all.
        sweep: layers whose input-energy threshold is swept for Figure 1(b).
        variant: tells experiments of one network and data set apart; part of the name.
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
    calibration: int | None = None
    validation: int | None = None
    sweep: tuple[str, ...] = ()
    variant: str = ""
    start: str | None = None
    trainable: str = "all"
    holdout: int = 0
    baseline: bool = True

    def __post_init__(self):
        models.check_name(self.network)
        if self.dataset not in datasets.CLASSES:
            raise ValueError(f"unknown data set {self.dataset!r}: choose one of {', '.join(datasets.CLASSES)}")
        datasets.check_options(self.dataset, self.data)
        check_protocol(self.tolerance, self.mode)
        if not isinstance(self.sweep, list | tuple):
            raise ValueError(f"experiment: sweep must be a list of layer names, not {self.sweep!r}")
        object.__setattr__(self, "sweep", tuple(self.sweep))
        missing = set(self.sweep) - set(matrix_layers(fresh_network(self))) if self.sweep else None
        if missing:
            raise ValueError(f"experiment: sweep names layers that {self.network} does not have: {', '.join(missing)}")
        self._check_choices()

    def _check_choices(self) -> None:
        if not isinstance(self.variant, str) or not re.fullmatch(r"[A-Za-z0-9._-]*(?<!-s\d)", self.variant):
            raise ValueError(
                f"experiment: variant is a text of letters, digits, '.', '_' and '-' that does not end like a seed "
                f"(-s1), not {self.variant!r}"
            )
        if not isinstance(self.start, str | None):
            raise ValueError(f"experiment: start is the name of an experiment, not {self.start!r}")
        if self.trainable not in ("all", "head"):
            raise ValueError(f"experiment: trainable is 'all' or 'head', not {self.trainable!r}")
        if type(self.holdout) is not int or self.holdout < 0:
            raise ValueError(f"experiment: holdout is a number of training images, not {self.holdout!r}")
        if not isinstance(self.baseline, bool):
            raise ValueError(f"experiment: baseline is true or false, not {self.baseline!r}")

    @property
    def name(self) -> str:
        """dataset/network@variant-sSEED, without an empty variant or seed 0; where its record lies among others."""
        variant = f"@{self.variant}" if self.variant else ""
        return f"{self.dataset}/{self.network}{variant}" + (f"-s{self.seed}" if self.seed else "")

    @classmethod
    def from_dict(cls, content: dict) -> "Experiment":
        """An experiment from plain values, as `asdict` gives and a profile holds them; defaults where they are silent.

        Raises:
            ValueError: an unknown or a missing key.
        """
        try:
            recipes = {name: Recipe(**content[name]) for name in ("train", "finetune")}
            return cls(**content | recipes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"experiment: {error}") from error


@dataclass(frozen=True)
class Record:
    """What an experiment measured, as plain data; see `data/README.md` for its keys."""

    content: dict

    def __getitem__(self, key: str):
        return self.content[key]

    @property
    def experiment(self) -> Experiment:
        return Experiment.from_dict(self.content["experiment"])

    @property
    def plan(self) -> RankPlan:
        return RankPlan.from_dict(self.content["plan"])

    @property
    def params_ratio(self) -> float:
        """Parameters with the useful layers split, as a share of the original's."""
        return self["cost"]["compact"]["params"] / self["cost"]["original"]["params"]

    @property
    def macs_ratio(self) -> float:
        """MACs for one image with the useful layers split, as a share of the original's."""
        return self["cost"]["compact"]["macs"] / self["cost"]["original"]["macs"]

    def save(self, path: Path | str) -> None:
        write_json(Path(path), self.content)

    @classmethod
    def load(cls, path: Path | str) -> "Record":
        """Read a record.

        Raises:
            ValueError: the file is cut off or no record.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or not {"experiment", "plan", "accuracy", "cost"} <= content.keys():
            raise ValueError(f"{path}: not a record of an experiment")
        record = cls(content)
        try:
            record.experiment, record.plan  # noqa: B018  both parse their part of the content
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a record that this version can read ({error})") from error
        return record


def run(
    experiment: Experiment,
    folder: Path | str,
    device: str = "auto",
    progress: bool = True,
    same_code: bool = False,
    start: Path | str | None = None,
    deadline: float | None = None,
) -> Record:
    """Run `experiment`, or what is left of it, in `folder` and return its record (also written as `record.json`).

    Args:
        device: "cpu", "cuda", ... or "auto" for a GPU where there is one.
        same_code: start again where other code began, or from other weights; default is to go on, as a record says
            which code ran a stage.
        start: folder of the experiment that this one starts from.
        deadline: value of `time.monotonic()` after which no stage begins, and no epoch but the first of a fit.

    Raises:
        ValueError: the folder holds another experiment, a name or option is unknown, or `start` is not the folder of
            the experiment to start from.
        OutOfTime: the deadline has passed and something is left; the next call goes on there.
    """
    folder = Path(folder)
    join()
    weights = starting_weights(experiment, start)
    if is_first():
        claim(folder, experiment, same_code, weights)
    work = _Work(experiment, folder, pick_device(device), progress, weights, deadline)
    stages = {stage_name(stage): work.stage(stage) for stage in stages_of(experiment)}
    record = Record(assemble(experiment, stages))
    record.save(folder / "record.json")
    return record


def starting_weights(experiment: Experiment, start: Path | str | None) -> Path | None:
    """The file of the weights that `experiment` starts from; None where these are seeded."""
    if (experiment.start is None) != (start is None):
        whose = f"the folder of {experiment.start}" if experiment.start else "no folder: its weights are seeded"
        raise ValueError(f"{experiment.name} starts from {whose}, not from {start}")
    if start is None:
        return None
    start = Path(start)
    if not (start / "train.json").exists():
        raise ValueError(f"{experiment.name} starts from {experiment.start}, which has not been trained in {start}")
    check_start(experiment, Experiment.from_dict(read_json(start / "experiment.json")["definition"]))
    return start / "original.safetensors"


def check_start(experiment: Experiment, start: Experiment) -> None:
    """Refuse to start `experiment` from the trained network of `start` where it cannot be, or would mislead."""
    if start.name != experiment.start:
        raise ValueError(f"{experiment.name} starts from {experiment.start}, not from {start.name}")
    if (start.network, start.width) != (experiment.network, experiment.width):
        raise ValueError(
            f"{experiment.name} is a {experiment.network} of width {experiment.width:g}: it cannot start from "
            f"{start.name}, a {start.network} of width {start.width:g}"
        )
    if start.dataset == experiment.dataset and start.holdout < experiment.holdout:
        raise ValueError(
            f"{experiment.name} holds out {experiment.holdout} images, on some of which {start.name} was trained: let "
            "that hold out as many"
        )


def claim(folder: Path, experiment: Experiment, same_code: bool, weights: Path | None = None) -> None:
    """Write down whose folder this is, which code began it, and from which weights; refuse one begun otherwise."""
    path, stages = folder / "experiment.json", finished_stages(folder)
    content = dict(definition=plain(asdict(experiment)), code=code_digest(), start=weights and digest(weights))
    if not stages and not list(folder.glob("*.ckpt")):  # nothing is lost: not even an epoch was finished here
        write_json(path, content)
    begun = read_json(path)
    if begun_definition(begun) != content["definition"]:
        raise ValueError(
            f"{folder} holds another experiment (see experiment.json there): delete it or name another folder"
        )
    same_start = begun.get("start") == content["start"]
    codes = {begun["code"], *(stage["made"]["code"] for stage in stages)}
    if same_code and (codes != {content["code"]} or not same_start):
        shutil.rmtree(folder)
        write_json(path, content)
    elif not same_start:
        raise ValueError(f"{folder} was begun from other weights of {experiment.start}: delete it to start again")


def finished_stages(folder: Path) -> list[dict]:
    return [read_json(file) for stage in STAGES if (file := folder / f"{stage_name(stage)}.json").exists()]


def begun_definition(begun: object) -> dict | None:
    """The definition in an experiment.json, with defaults for what experiments did not have when it was written."""
    try:
        return plain(asdict(Experiment.from_dict(begun["definition"])))
    except (KeyError, TypeError, ValueError):  # whatever it is, it is no experiment
        return None


def code_files() -> list[Path]:
    """The modules whose code decides what an experiment measures."""
    package = Path(__file__).parent
    return sorted(path for path in package.rglob("*.py") if path.relative_to(package).as_posix() not in PRESENTATION)


@cache
def code_digest() -> str:
    """Twelve hexadecimal digits that change with the code an experiment runs; of the code that this process runs."""
    return digest(*code_files())


def digest(*paths: Path) -> str:
    """Twelve hexadecimal digits that change with the content of the files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def plain(content):
    """The same content as JSON gives it back: tuples are lists."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one."""
    if name == "auto":
        return own_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error


class _Work:
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

    def stage(self, compute: Callable[["_Work"], dict]) -> dict:
        """The stage's result: read where it is there, else computed and written with the seconds it took.

        The checkpoint of a fit goes last, so that no epoch is lost in between.
        """
        name = stage_name(compute)
        path = self.folder / f"{name}.json"
        missing = not all(file.exists() for file in [path, *(self.folder / left for left in PRODUCES.get(name, []))])
        if totals(int(missing and is_first()))[0]:  # as the first process sees it
            check_time(self.deadline, f"{self.experiment.name} has its stage {name} ahead")
            start = time.perf_counter()
            result = compute(self)
            made = dict(device=describe(self.device), date=datetime.now(UTC).date().isoformat(), code=code_digest())
            write_json(path, plain(result) | dict(made=made, seconds=round(time.perf_counter() - start, 1)))
        if is_first():
            (self.folder / f"{name}.ckpt").unlink(missing_ok=True)
        wait()
        return read_json(path)

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
            dataset = datasets.load(self.experiment.dataset, **self.experiment.data)
            held_out = self.experiment.holdout
            self._images = hold_out(dataset, held_out) if held_out else (dataset, dataset.test)
        return self._images

    @property
    def calibration(self) -> Batches:
        split = self.dataset.train.take(self.experiment.calibration)
        return self.dataset.batches(split.to(self.device))

    @property
    def validation(self) -> Batches:
        split = self.consulted.take(self.experiment.validation)
        return self.dataset.batches(split.to(self.device))

    @property
    def test(self) -> Batches:
        return self.dataset.batches(self.dataset.test.to(self.device))

    def initial(self) -> nn.Module:
        """The network before its training."""
        network = fresh_network(self.experiment)
        if self.weights is not None:
            adopt(network, read_weights(self.weights))
        return network.to(self.device, memory_format=torch.channels_last)

    def original(self) -> nn.Module:
        """The trained network."""
        return original_network(self.experiment, self.folder).to(self.device, memory_format=torch.channels_last)

    def plan(self) -> RankPlan:
        return RankPlan.from_dict(read_json(self.folder / "search.json")["plan"])

    def grams(self) -> dict[str, Tensor]:
        return calibrated_grams(self.folder, self.device)

    def merged(self) -> nn.Module:
        """The fine-tuned network with only the useful layers split."""
        original = self.original()
        compact = load_compact(original, self.folder / "finetuned")
        merged = merge_useless(compact, original, self.plan())
        return merged.to(self.device, memory_format=torch.channels_last)

    def fit(self, network: nn.Module, recipe: Recipe, stage: str, part: str = "") -> list[dict]:
        """Fit `network` with a checkpoint that is there only until the stage has ended."""
        description = f"{self.experiment.name} {stage}"
        checkpoint, seed = self.folder / f"{stage}.ckpt", self.experiment.seed
        return fit(network, self.dataset, recipe, seed, checkpoint, self.device, description, part, self.deadline)


def fresh_network(experiment: Experiment) -> nn.Module:
    """The network of an experiment with its seeded initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return models.create(experiment.network, datasets.CLASSES[experiment.dataset], experiment.width)


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Split]:
    """`dataset` without its last `count` training images, and these."""
    train = dataset.train
    if count >= len(train):
        raise ValueError(f"{dataset.name}: of {len(train)} training images {count} cannot be held out")
    kept = len(train) - count
    return replace(dataset, train=train.take(kept)), Split(train.images[kept:], train.labels[kept:])


def head_of(network: nn.Module) -> str:
    """The path of the layer that gives the logits."""
    return last_layer(network, next(network.parameters()).new_zeros(1, 3, SIDE, SIDE))


def adopt(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` into `network`, except a classifier for another number of classes.

    Raises:
        ValueError: the weights differ from the network's in more than the classifier's shape.
    """
    own, head = network.state_dict(), head_of(network)
    kept = {name: tensor for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape}
    strange = own.keys() ^ weights.keys() | {name for name in kept if name.rpartition(".")[0] != head}
    if strange:
        raise ValueError(f"the weights to start from differ in more than the classifier {head}: {', '.join(strange)}")
    network.load_state_dict(weights | kept)


def original_network(experiment: Experiment, folder: Path) -> nn.Module:
    """The trained network that the training stage left in `folder`."""
    network = fresh_network(experiment)
    network.load_state_dict(read_weights(folder / "original.safetensors"))
    return network


def calibrated_grams(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """X^T X of every layer that the calibration stage left in `folder`, in the order of the forward pass."""
    grams = read_weights(folder / "grams.safetensors", device)
    return {name: grams[name] for name in read_json(folder / "calibrate.json")["layers"]}


def _train(work: _Work) -> dict:
    network = work.initial()
    part = head_of(network) if work.experiment.trainable == "head" else ""
    history = work.fit(network, work.experiment.train, "train", part)
    write_weights(work.folder / "original.safetensors", network)
    return dict(history=history, accuracy=evaluate(network, work.test), cost=asdict(count_cost(network)))


def _calibrate(work: _Work) -> dict:
    grams = accumulate_grams(work.original(), work.calibration, progress=work.progress)
    write_tensors(work.folder / "grams.safetensors", grams)
    return dict(layers=list(grams), images=len(work.calibration.split))


def _search(work: _Work) -> dict:
    experiment = work.experiment
    plan = search_ranks(
        work.original(), work.grams(), work.validation, experiment.tolerance, experiment.mode, progress=work.progress
    )
    return dict(plan=plan.to_dict(), mlu=plan.mlu, weight_mlu=plan.weight_mlu)


def _decompose(work: _Work) -> dict:
    projected = project_network(work.original(), work.plan(), work.grams())
    compact = decompose(projected, work.plan())
    save_compact(compact, work.plan(), work.folder / "decomposed")
    return dict(projected=evaluate(projected, work.test), accuracy=evaluate(compact, work.test))


def _finetune(work: _Work) -> dict:
    plan, original = work.plan(), work.original()
    compact = load_compact(original, work.folder / "decomposed").to(work.device)
    history = work.fit(compact, work.experiment.finetune, "finetune")
    save_compact(compact, plan, work.folder / "finetuned")
    merged = merge_useless(compact, original, plan)
    return dict(
        history=history,
        accuracy=evaluate(compact, work.test),
        merged_accuracy=evaluate(merged, work.test),
        cost=asdict(count_cost(merged)),
        split_cost=asdict(count_cost(compact)),
    )


def _baseline(work: _Work) -> dict:
    """The original network, given the same further training as the compact one."""
    network = work.original()
    history = work.fit(network, work.experiment.finetune, "baseline")
    return dict(history=history, accuracy=evaluate(network, work.test))


def _latency(work: _Work) -> dict:
    """Images a second of the original and of the compact network, at each batch size and precision."""
    networks, test = dict(original=work.original(), compact=work.merged()), work.test
    images, _ = next(iter(work.dataset.batches(test.split, max(BATCH_SIZES))))
    rows = []
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_fast_bfloat16(work.device)]:
        typed = {name: copy.deepcopy(network).to(dtype) for name, network in networks.items()}
        for size in BATCH_SIZES:
            batch = images[torch.arange(size) % len(images)].to(dtype, memory_format=torch.channels_last)
            where = dict(batch=size, device=describe(work.device), precision=str(dtype).removeprefix("torch."))
            rows += [
                dict(network=name, images_per_second=float(f"{speed:.4g}")) | where
                for name, speed in images_per_second(typed, batch).items()
            ]
    return dict(rows=rows)


def _spectra(work: _Work) -> dict:
    """Singular values of W, W', X and Y of every layer, as Figure 1(a) draws them."""
    plan, grams, spectra = work.plan(), work.grams(), {}
    layers = matrix_layers(work.original())
    for entry in plan.layers:
        W, gram = weight_matrix(layers[entry.layer]), grams[entry.layer]
        inputs, outputs = Spectrum.of(gram), Spectrum.of(output_gram(gram, W))
        projected = project_weight(W, inputs, outputs, entry.k_s, entry.k_t)
        spectra[entry.layer] = dict(
            weight=digits(torch.linalg.svdvals(W)),
            projected=digits(torch.linalg.svdvals(projected)),
            inputs=digits(inputs.eigenvalues.sqrt()),
            outputs=digits(outputs.eigenvalues.sqrt()),
        )
    return dict(layers=spectra)


def digits(values: Tensor) -> list[float]:
    """Six significant digits are more than a figure shows and keep a record small."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _sweep(work: _Work) -> dict:
    """k_S, accuracy and ||W - W'|| / ||W|| against the input energy, a layer at a time, as in Figure 1(b).

    W' = P_S W here: the output side is left alone.
    """
    network, grams = work.original(), work.grams()
    layers, replay = matrix_layers(network), Replay(network, list(work.validation))
    rows = []
    with evaluating(network):
        for name in (name for name in grams if name in work.experiment.sweep):
            replay.advance(layers[name])
            rows += [dict(layer=name) | row for row in sweep_layer(layers[name], grams[name], replay)]
    return dict(rows=rows)


def sweep_layer(layer, gram: Tensor, replay: Replay) -> list[dict]:
    """One row (energy, k_s, correct, norm_difference) for each of `ENERGIES`; the layer's weight comes back."""
    W, inputs = weight_matrix(layer), Spectrum.of(gram)
    rows = []
    for energy in ENERGIES:
        k_s = dimension_for_energy(inputs, energy)
        projected = project_weight(W, inputs, inputs, k_s, W.shape[1])
        set_weight_matrix(layer, projected)
        correct = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in replay)
        difference = torch.linalg.matrix_norm(W - projected) / torch.linalg.matrix_norm(W)
        rows.append(dict(energy=energy, k_s=k_s, correct=correct, norm_difference=difference.item()))
    set_weight_matrix(layer, W)
    return rows


STAGES = (_train, _calibrate, _search, _spectra, _sweep, _decompose, _finetune, _baseline, _latency)


def stage_name(stage: Callable[[_Work], dict]) -> str:
    """What its file, and its key in a record, is called."""
    return stage.__name__.lstrip("_")


def stages_of(experiment: Experiment) -> list[Callable[[_Work], dict]]:
    """The stages of an experiment; a baseline that would be fitted for no epoch is the original itself."""
    without_baseline = not experiment.baseline or experiment.finetune.epochs == 0
    return [stage for stage in STAGES if not (stage is _baseline and without_baseline)]


def assemble(experiment: Experiment, stages: dict[str, dict]) -> dict:
    """The record's content from the stages' results."""
    train, search, finetune = stages["train"], stages["search"], stages["finetune"]
    baseline = stages.get("baseline", dict(accuracy=None, history=[]))
    history = dict(train=train["history"], finetune=finetune["history"], baseline=baseline["history"])
    return dict(
        experiment=plain(asdict(experiment)),
        accuracy=dict(
            original=train["accuracy"],
            projected=stages["decompose"]["projected"],
            decomposed=stages["decompose"]["accuracy"],
            finetuned=finetune["accuracy"],
            merged=finetune["merged_accuracy"],
            baseline=baseline["accuracy"],
        ),
        cost=dict(original=train["cost"], compact=finetune["cost"], split=finetune["split_cost"]),
        plan=search["plan"],
        consulted="held-out training" if experiment.holdout else "test",
        spectra=stages["spectra"]["layers"],
        sweep=stages["sweep"]["rows"],
        latency=stages["latency"]["rows"],
        history=history,
        calibration_images=stages["calibrate"]["images"],
        seconds={
            name: seconds_of(history[name]) if name in history else stage["seconds"] for name, stage in stages.items()
        },
        made={name: stage["made"] for name, stage in stages.items()},
        versions={package: version(package) for package in VERSIONS_OF} | dict(python=platform.python_version()),
    )


def seconds_of(history: list[dict]) -> float:
    """How long a fit took, whatever number of times it was interrupted."""
    return round(sum(epoch["seconds"] for epoch in history), 1)


def describe(device: torch.device) -> str:
    """The processor or GPU, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads"
