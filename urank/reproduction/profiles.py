"""Profiles: sets of experiments, one YAML file each in `profiles/`.

Results of a profile are in `runs/PROFILE/DATASET/NETWORK[@VARIANT][-sSEED]`; the environment variable URANK_RUNS
replaces `runs`. Committed records are in `data/records/`.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from torch import Tensor, nn

from urank.files import read_json
from urank.plan import RankPlan
from urank.reproduction import run_folder
from urank.reproduction.experiment import Experiment, check_held_out, check_start
from urank.reproduction.paths import MEASUREMENTS, NOTEBOOKS, PROFILES, RECORDS, ROOT
from urank.reproduction.provenance import file_digest
from urank.reproduction.record import Record
from urank.reproduction.runner import run


def runs_folder() -> Path:
    """Return the folder of all live results."""
    return Path(os.environ.get("URANK_RUNS", ROOT / "runs"))


@dataclass(frozen=True)
class Profile:
    """A set of experiments, and which of them each notebook shows.

    Attributes:
        name: name of the file in `profiles/`, without its ending.
        experiments: the experiments by name, for example "digits10/vgg11".
        notebooks: for each notebook the names of the experiments that it shows.
        recompute_on_code_change: delete and recompute results of another version of the code. For profiles that take
            minutes; by default results are kept.
    """

    name: str
    experiments: dict[str, Experiment]
    notebooks: dict[str, list[str]]
    recompute_on_code_change: bool = False

    def find(self, name: str) -> Experiment:
        """Return the experiment called `name`, which may be a listed one with another seed ("digits10/vgg11-s2").

        Raises:
            ValueError: there is none.
        """
        if name in self.experiments:
            return self.experiments[name]
        seed = re.search(r"-s(\d+)$", name)
        for experiment in self.experiments.values():
            seeded = self.with_seed(experiment, int(seed[1]) if seed else 0)
            if seeded.name == name:
                return seeded
        raise ValueError(
            f"profile {self.name!r} has no experiment {name!r}: choose one of {', '.join(self.experiments)}"
        )

    def with_seed(self, experiment: Experiment, seed: int) -> Experiment:
        """Return the experiment with another seed, also in the experiment that it starts from."""
        if experiment.seed == seed:
            return experiment
        start = experiment.start and self.with_seed(self.find(experiment.start), seed).name
        return replace(experiment, seed=seed, start=start)

    def names(self, patterns: Iterable[str] = (), seeds: Iterable[int] = ()) -> list[str]:
        """Return the names of the experiments that match a pattern; default all.

        Args:
            patterns: names as dataset/network or network/dataset, or patterns with "*" and "?".
            seeds: repeat each experiment with each of these seeds; default the listed seeds.

        Raises:
            ValueError: nothing matches a pattern.
        """
        matching = [name for pattern in patterns or ["*"] for name in self._matching(pattern)]
        if seeds:
            matching = [self.with_seed(self.find(name), seed).name for name in matching for seed in seeds]
        return list(dict.fromkeys(matching))

    def _matching(self, pattern: str) -> list[str]:
        forms = {name: [name, "/".join(reversed(name.split("/", 1)))] for name in self.experiments}
        matching = [name for name, both in forms.items() if any(fnmatchcase(form, pattern) for form in both)]
        return matching or [self.find(pattern).name]


def profile_names() -> list[str]:
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Read `profiles/NAME.yaml`.

    Raises:
        ValueError: no such profile, not YAML, an unknown key, notebook or experiment, two experiments with one name, or
            an experiment that cannot start from the one it names.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(profile_names())}")
    try:
        return parse_profile(name, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_profile(name: str, content: object) -> Profile:
    """Return the profile from the content of its file."""
    option = "recompute_on_code_change"
    if not isinstance(content, dict) or content.keys() - {option} != {"experiments", "notebooks"}:
        raise ValueError(f"a profile has the keys 'experiments', 'notebooks' and, optionally, {option!r}")
    if not isinstance(content.get(option, False), bool):
        raise ValueError(f"{option} must be true or false, got {content[option]!r}")
    if not isinstance(content["experiments"], list):
        raise ValueError("'experiments' must be a list")
    if not isinstance(content["notebooks"], dict):
        raise ValueError("'notebooks' must be a mapping from a notebook to a list of experiments")
    listed = [Experiment.from_dict(entry) for entry in content["experiments"]]
    by_name = {experiment.name: experiment for experiment in listed}
    if len(by_name) < len(listed):
        raise ValueError("two experiments have the same data set, network, variant and seed")
    check_starts(by_name)
    for notebook, shown in content["notebooks"].items():
        if not (NOTEBOOKS / f"{notebook}.ipynb").exists():
            raise ValueError(f"there is no notebook {notebook!r} in notebooks/")
        if not isinstance(shown, list):
            raise ValueError(f"notebook {notebook!r} must have a list of experiments, not {shown!r}")
        for experiment in set(shown) - set(by_name):
            raise ValueError(f"notebook {notebook!r} shows {experiment!r}, which the profile does not run")
    return Profile(name, by_name, content["notebooks"], content.get(option, False))


def check_starts(by_name: dict[str, Experiment]) -> None:
    """Follow every experiment to one with seeded weights; raise an error for an unknown start or a cycle."""
    for experiment in by_name.values():
        path = [experiment.name]
        while (start := by_name[path[-1]].start) is not None:
            if start not in by_name:
                raise ValueError(f"{path[-1]!r} starts from {start!r}, which the profile does not run")
            if start in path:
                raise ValueError(f"experiments start from each other: {' from '.join([*path, start])}")
            check_start(by_name[path[-1]], by_name[start])
            check_held_out(experiment, by_name[start])
            path.append(start)


def folder_of(profile: str, name: str) -> Path:
    """Return the folder of one experiment of a profile."""
    return runs_folder() / profile / name


def reproduce(profile: str, name: str, device: str = "auto", deadline: float | None = None) -> Record:
    """Run one experiment of a profile, or what is left of it (see `runner.run`), after the one that it starts from.

    Raises:
        ValueError: the profile has no experiment of this name.
        OutOfTime: the deadline has passed and something is left.
    """
    loaded = load_profile(profile)
    experiment, start = loaded.find(name), None
    if experiment.start is not None:
        reproduce(profile, experiment.start, device, deadline)
        start = folder_of(profile, experiment.start)
    recompute = loaded.recompute_on_code_change
    return run(experiment, folder_of(profile, name), device, recompute=recompute, start=start, deadline=deadline)


def publish(profile: str, name: str) -> Path:
    """Copy the record of a finished experiment to `data/records/` and return its path there.

    Raises:
        ValueError: the experiment is not finished.
    """
    source, target = folder_of(profile, name) / "record.json", RECORDS / f"{name}.json"
    if not source.exists():
        raise ValueError(f"{source}: {name} has no record yet; finish it with `urank reproduce` first")
    Record.load(source).save(target)
    return target


def live_records(profile: str, notebook: str) -> list[Record]:
    """Return the records that a notebook shows; run what is missing."""
    notebooks = load_profile(profile).notebooks
    if notebook not in notebooks:
        raise ValueError(f"profile {profile!r} has no notebook {notebook!r}: it has {', '.join(notebooks)}")
    return [reproduce(profile, name) for name in notebooks[notebook]]


def trained_network(profile: str, record: Record) -> nn.Module:
    """Return the trained network behind a live record, on the CPU.

    Raises:
        ValueError: the network in the run's folder is not that of the record.
    """
    folder = folder_of(profile, record.experiment.name)
    if file_digest(folder / "original.safetensors") != record.weights:
        raise ValueError(f"{folder}: its network is not the one of the record; run `urank reproduce` again")
    return run_folder.original_network(record.experiment, folder)


def calibrated_grams(profile: str, record: Record) -> dict[str, Tensor]:
    """Return X^T X of every layer of a live record, in forward order, on the CPU."""
    return run_folder.calibrated_grams(folder_of(profile, record.experiment.name))


def recorded(pattern: str = "*/*") -> list[Record]:
    """Return the committed records whose names match, for example "cifar10/vgg11" or "cifar10/*", sorted by name.

    "*" also matches "/", and resnet18 comes before resnet101.

    Raises:
        FileNotFoundError: the package was installed without the repository's data folder.
    """
    if not RECORDS.exists():
        raise FileNotFoundError(f"{RECORDS}: the records are in the repository's data/records; work from a checkout")
    names = [path.relative_to(RECORDS).with_suffix("").as_posix() for path in RECORDS.rglob("*.json")]
    return [Record.load(RECORDS / f"{name}.json") for name in sorted(names, key=natural) if fnmatchcase(name, pattern)]


def measurement(name: str) -> tuple[RankPlan, dict]:
    """Return the plan and the results that `urank measure` wrote and that are committed in `data/measurements/`."""
    return RankPlan.load(MEASUREMENTS / name / "plan.json"), read_json(MEASUREMENTS / name / "results.json")


def natural(name: str) -> list[str | int]:
    """Return a sorting key that compares the numbers in names as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
