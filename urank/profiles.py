"""Profiles: which experiments are run, at which size. One YAML file each in `profiles/`.

The live results of a profile lie under `runs/PROFILE/DATASET/NETWORK` (the environment variable URANK_RUNS names
another folder than `runs`), the committed measurements on real images under `data/records/`.
"""

import os
from pathlib import Path

import yaml

from urank.experiments import Experiment, Record, run

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "data" / "records"


def runs_folder() -> Path:
    return Path(os.environ.get("URANK_RUNS", ROOT / "runs"))


def load_profile(name: str) -> dict[str, Experiment]:
    """The experiments of a profile by their names, for example {"digits10/vgg11": Experiment(...)}.

    Raises:
        ValueError: no such profile, not YAML, an unknown key, or two experiments of one name.
    """
    path = ROOT / "profiles" / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"unknown profile {name!r}: choose one of {names}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"experiments"}:
        raise ValueError(f"{path}: a profile has the one key 'experiments', a list")
    experiments = [parse(path, entry) for entry in content["experiments"]]
    by_name = {experiment.name: experiment for experiment in experiments}
    if len(by_name) < len(experiments):
        raise ValueError(f"{path}: two experiments have the same data set, network and seed")
    return by_name


def parse(path: Path, entry: dict) -> Experiment:
    try:
        return Experiment.from_dict(entry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reproduce(profile: str, name: str, device: str = "auto") -> Record:
    """Run one experiment of a profile, or read its record where it has been run.

    Raises:
        ValueError: the profile has no experiment of this name.
    """
    experiments = load_profile(profile)
    if name not in experiments:
        raise ValueError(f"profile {profile!r} has no experiment {name!r}: choose one of {', '.join(experiments)}")
    return run(experiments[name], runs_folder() / profile / name, device)


def records() -> dict[str, Record]:
    """The committed records by name, for example "cifar10/vgg11"."""
    return {path.relative_to(RECORDS).with_suffix("").as_posix(): Record.load(path) for path in sorted(RECORDS.rglob("*.json"))}
