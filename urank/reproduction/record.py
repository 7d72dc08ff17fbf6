"""The record of an experiment: what was run and what it measured, read once into typed fields."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from urank.factorize import Cost
from urank.files import read_json, write_json
from urank.plan import NOT_RECORDED, RankPlan
from urank.reproduction.experiment import Experiment, as_json


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on the test images, in percent.

    `projected` has W' in every layer, `decomposed` has every layer split, `finetuned` is that network after
    fine-tuning, `merged` has only the useful layers split. `baseline` is the original network after the same
    fine-tuning, None where that was not run.
    """

    original: float
    projected: float
    decomposed: float
    finetuned: float
    merged: float
    baseline: float | None


@dataclass(frozen=True)
class Costs:
    """Parameters and MACs per image of the original network, with the useful layers split, and with all split."""

    original: Cost
    compact: Cost
    split: Cost


@dataclass(frozen=True)
class LayerSpectra:
    """Singular values of one layer's W, W', X and Y."""

    weight: list[float]
    projected: list[float]
    inputs: list[float]
    outputs: list[float]


@dataclass(frozen=True)
class SweepRow:
    """One input-energy threshold of Figure 1(b); `norm_difference` is ||W - W'|| / ||W||."""

    layer: str
    energy: float
    k_s: int
    correct: int
    norm_difference: float


@dataclass(frozen=True)
class Throughput:
    """Images per second of the "original" or the "compact" network at one batch size."""

    network: str
    images_per_second: float
    batch: int
    device: str
    precision: str


@dataclass(frozen=True)
class Record:
    """What an experiment measured; `data/README.md` describes the JSON file.

    >>> Record.load("data/records/cifar10/vgg11.json").accuracy.original
    91.51

    Attributes:
        experiment: what was run.
        accuracy, cost: before and after the network is split.
        plan: the outcome of the search.
        consulted: the images that the search used, "test" or "held-out training".
        spectra: singular values by layer.
        sweep: the rows of Figure 1(b).
        throughput: images per second; "latency" in the file.
        history: one entry per epoch, by fit.
        calibration_images: how many training images the Gram matrices were summed over.
        seconds: by stage.
        made: device, date, code and commit by stage; older records lack some of these.
        other_code: the stages that another version of the code computed; None in older records.
        versions: of Python and the libraries.
        weights: digest of the trained network's weights; None if not recorded.
    """

    experiment: Experiment
    accuracy: Accuracy
    cost: Costs
    plan: RankPlan
    consulted: str
    spectra: dict[str, LayerSpectra]
    sweep: tuple[SweepRow, ...]
    throughput: tuple[Throughput, ...]
    history: dict[str, list[dict]]
    calibration_images: int
    seconds: dict[str, float]
    made: dict[str, dict]
    other_code: list[str] | None
    versions: dict[str, str]
    weights: str | None

    @property
    def params_ratio(self) -> float:
        """Parameters with the useful layers split, as a share of the original's."""
        return self.cost.compact.params / self.cost.original.params

    @property
    def macs_ratio(self) -> float:
        """MACs per image with the useful layers split, as a share of the original's."""
        return self.cost.compact.macs / self.cost.original.macs

    @property
    def finetuned(self) -> bool:
        """Whether the split network was fine-tuned."""
        return self.experiment.finetune.epochs > 0

    @property
    def date(self) -> str:
        """The day on which the split network was finished."""
        return self.made["finetune"].get("date", NOT_RECORDED)

    def devices(self) -> set[str]:
        """Return every device that computed a stage."""
        return {name for made in self.made.values() for name in made.get("device", NOT_RECORDED).split("; ")}

    @classmethod
    def from_dict(cls, content: dict) -> "Record":
        """Return the record that `to_dict` wrote; experiments get defaults for fields that did not exist then.

        Raises:
            KeyError, TypeError, ValueError: a missing key, or a value that the field does not allow.
        """
        parsed = dict(
            experiment=Experiment.from_dict(content["experiment"]),
            accuracy=Accuracy(**content["accuracy"]),
            cost=Costs(**{name: Cost(**cost) for name, cost in content["cost"].items()}),
            plan=RankPlan.from_dict(content["plan"]),
            spectra={layer: LayerSpectra(**values) for layer, values in content["spectra"].items()},
            other_code=content.get("other_code"),
            sweep=tuple(SweepRow(**row) for row in content["sweep"]),
            throughput=tuple(Throughput(**row) for row in content["latency"]),
        )
        plain = {field.name: content[field.name] for field in fields(cls) if field.name not in parsed}
        return cls(**parsed, **plain)

    def to_dict(self) -> dict:
        """Return the record as the plain values of its JSON file."""
        plan = {name: value for name, value in self.plan.to_dict().items() if value != NOT_RECORDED}
        content = as_json(asdict(self) | dict(plan=plan))
        if self.other_code is None:
            del content["other_code"]
        return {"latency" if name == "throughput" else name: value for name, value in content.items()}

    def save(self, path: Path | str) -> None:
        """Write the record as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Record":
        """Read a record.

        Raises:
            ValueError: the file is cut off or is not a record.
        """
        content = read_json(Path(path))
        try:
            return cls.from_dict(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a record that this version can read ({error})") from error
