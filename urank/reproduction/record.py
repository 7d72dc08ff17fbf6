"""What is run and what it measured, as plain data."""

from dataclasses import asdict, dataclass
from pathlib import Path

from urank.files import read_json, write_json
from urank.plan import RankPlan
from urank.reproduction.experiment import Experiment, as_json


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

    @property
    def finetuned(self) -> bool:
        """Whether the split network was fine-tuned at all; where not, its accuracy is that before."""
        return self["experiment"]["finetune"]["epochs"] > 0

    def save(self, path: Path | str) -> None:
        write_json(Path(path), self.content)

    @classmethod
    def load(cls, path: Path | str) -> "Record":
        """Read a record.

        Raises:
            ValueError: the file is cut off or no record.
        """
        content = read_json(Path(path))
        needed = {"experiment", "weights", "plan", "consulted", "accuracy", "cost", "latency"}
        if not isinstance(content, dict) or not needed <= content.keys():
            raise ValueError(f"{path}: not a record of an experiment, or one that an early version of urank wrote")
        try:
            experiment = Experiment.from_dict(content["experiment"])  # with defaults for what it did not have then
            RankPlan.from_dict(content["plan"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a record that this version can read ({error})") from error
        return cls(content | dict(experiment=as_json(asdict(experiment))))
