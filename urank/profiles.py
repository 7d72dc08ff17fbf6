"""Profiles: which experiments are run, at which size. One YAML file each in `profiles/`.

The live results of a profile lie under `runs/PROFILE/DATASET/NETWORK` (the environment variable URANK_RUNS names
another folder than `runs`), the committed measurements on real images under `data/records/`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor, nn

from urank import experiments
from urank.experiments import Experiment, Record, run

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "data" / "records"


def runs_folder() -> Path:
    return Path(os.environ.get("URANK_RUNS", ROOT / "runs"))


@dataclass(frozen=True)
class Profile:
    """Experiments by name, for example "digits10/vgg11", and for each notebook the names of those it shows."""

    name: str
    experiments: dict[str, Experiment]
    notebooks: dict[str, list[str]]


def load_profile(name: str) -> Profile:
    """Read `profiles/NAME.yaml`.

    Raises:
        ValueError: no such profile, not YAML, an unknown key, notebook or experiment, or two experiments of one name.
    """
    path = ROOT / "profiles" / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"unknown profile {name!r}: choose one of {names}")
    try:
        return parse_profile(name, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_profile(name: str, content: object) -> Profile:
    if not isinstance(content, dict) or content.keys() != {"experiments", "notebooks"}:
        raise ValueError("a profile has two keys: 'experiments', a list, and 'notebooks', a mapping")
    if not isinstance(content["experiments"], list):
        raise ValueError("'experiments' must be a list")
    if not isinstance(content["notebooks"], dict):
        raise ValueError("'notebooks' must be a mapping from a notebook to a list of experiments")
    listed = [Experiment.from_dict(entry) for entry in content["experiments"]]
    by_name = {experiment.name: experiment for experiment in listed}
    if len(by_name) < len(listed):
        raise ValueError("two experiments have the same data set, network and seed")
    for notebook, shown in content["notebooks"].items():
        if not (ROOT / "notebooks" / f"{notebook}.ipynb").exists():
            raise ValueError(f"there is no notebook {notebook!r} in notebooks/")
        if not isinstance(shown, list):
            raise ValueError(f"notebook {notebook!r} must have a list of experiments, not {shown!r}")
        for experiment in set(shown) - set(by_name):
            raise ValueError(f"notebook {notebook!r} shows {experiment!r}, which the profile does not run")
    return Profile(name, by_name, content["notebooks"])


def run_folder(profile: str, name: str) -> Path:
    """Where the stages and the record of one experiment of a profile lie."""
    return runs_folder() / profile / name


def reproduce(profile: str, name: str, device: str = "auto", same_code: bool = False) -> Record:
    """Run one experiment of a profile, or read its record where it has been run (see `experiments.run`).

    Raises:
        ValueError: the profile has no experiment of this name.
    """
    by_name = load_profile(profile).experiments
    if name not in by_name:
        raise ValueError(f"profile {profile!r} has no experiment {name!r}: choose one of {', '.join(by_name)}")
    return run(by_name[name], run_folder(profile, name), device, same_code=same_code)


def live_records(profile: str, notebook: str) -> list[Record]:
    """The records that a notebook shows live, run where they have not been."""
    notebooks = load_profile(profile).notebooks
    if notebook not in notebooks:
        raise ValueError(f"profile {profile!r} has no notebook {notebook!r}: it has {', '.join(notebooks)}")
    return [reproduce(profile, name) for name in notebooks[notebook]]


def trained_network(profile: str, record: Record) -> nn.Module:
    """The trained network behind a live record, on the CPU."""
    return experiments.original_network(record.experiment, run_folder(profile, record.experiment.name))


def calibrated_grams(profile: str, record: Record) -> dict[str, Tensor]:
    """X^T X of its layers, in the order of the forward pass, on the CPU."""
    return experiments.calibrated_grams(run_folder(profile, record.experiment.name))


def recorded(pattern: str = "*/*") -> list[Record]:
    """The committed records whose names match, for example "cifar10/vgg11" or "cifar10/*"."""
    return [Record.load(path) for path in sorted(RECORDS.glob(f"{pattern}.json"))]
