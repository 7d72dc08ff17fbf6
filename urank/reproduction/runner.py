"""One network on one data set, end to end, from training to a record.

An experiment may start from the network that another one trained. Its stages are in `stages`; a run that was killed
goes on where it stopped.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from urank.deadline import OutOfTime
from urank.distributed import is_first, join, own_device
from urank.files import delete_unfinished, read_json, write_json
from urank.reproduction.experiment import Experiment, as_json, check_start
from urank.reproduction.provenance import code_digest, digest
from urank.reproduction.record import Record
from urank.reproduction.run_folder import SETTINGS, Work, joined
from urank.reproduction.stages import STAGES, stages_of
from urank.training.recipe import what_is_fitted

FITS = ("train", "finetune")  # the settings that are recipes


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
        progress: show bars.
        same_code: start again where other code began, or from other weights; default is to go on, as a record says
            which code ran a stage.
        start: folder of the experiment that this one starts from.
        deadline: value of `time.monotonic()` by which to stop: no stage begins after it, and no epoch of a fit or layer
            of a search, but the first, that would not end before it if it took as long as the last.

    Raises:
        ValueError: the folder holds another experiment or a stage that was run with other settings, a name or option
            is unknown, or `start` is not the folder of the experiment to start from.
        OutOfTime: the deadline has passed and something is left, or another run still works in `folder`; the next call
            goes on there.
    """
    folder = Path(folder).resolve()
    join()
    weights = starting_weights(experiment, start)
    with alone_in(folder, deadline):
        if is_first():
            claim(folder, experiment, same_code, weights)
            delete_unfinished(folder)
        work = Work(experiment, folder, pick_device(device), progress, weights, deadline)
        stages = {name: work.stage(name, STAGES[name]) for name in stages_of(experiment)}
        record = Record.from_dict(assemble(experiment, stages) | dict(weights=digest(folder / "original.safetensors")))
        record.save(folder / "record.json")
    return record


@contextmanager
def alone_in(folder: Path, deadline: float | None) -> Iterator[None]:
    """Inside the block no other run works in `folder`; waits, and says so, while one does, until the deadline."""
    if not is_first():  # the first process of a run locks for all
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # the system unlocks it when a process is killed
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{folder}: waiting for another run that works there", file=sys.stderr)
        wait_for(lock, folder, deadline)
    try:
        yield
    finally:
        lock.release()


def wait_for(lock: FileLock, folder: Path, deadline: float | None) -> None:
    longest = -1 if deadline is None else max(0.0, deadline - time.monotonic())  # -1: as long as it takes
    try:
        lock.acquire(timeout=longest)
    except Timeout:
        raise OutOfTime(f"another run still works in {folder}") from None


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


def claim(folder: Path, experiment: Experiment, same_code: bool, weights: Path | None = None) -> None:
    """Write down whose folder this is, which code began it, and from which weights; refuse one begun otherwise."""
    path, stages = folder / "experiment.json", finished_stages(folder)
    content = dict(definition=as_json(asdict(experiment)), code=code_digest(), start=weights and digest(weights))
    if not stages and not list(folder.glob("*.ckpt")):  # nothing is lost: not even an epoch was finished here
        write_json(path, content)
        (folder / "labels.json").unlink(missing_ok=True)
    begun = read_json(path) if path.exists() else {}  # gone where a restart was killed while it deleted the folder
    definition = begun_definition(begun)
    if begun:
        check_settings(folder, definition, content["definition"])
    same_start = begun.get("start") == content["start"]
    codes = {begun.get("code"), *(stage["made"]["code"] for stage in stages)}
    codes |= {maker["code"] for stage in folder.glob("*.begun") for maker in read_json(stage)["makers"]}
    if same_code and (codes != {content["code"]} or not same_start):
        shutil.rmtree(folder)
        write_json(path, content)
    elif not begun:
        raise ValueError(f"{folder} holds stages but no experiment.json to say of what: delete it to start again")
    elif not same_start:
        raise ValueError(f"{folder} was begun from other weights of {experiment.start}: delete it to start again")
    elif definition != content["definition"]:
        (folder / "record.json").unlink(missing_ok=True)  # it is of the experiment as it was defined before
        write_json(path, begun | dict(definition=content["definition"]))


def check_settings(folder: Path, begun: dict | None, wanted: dict) -> None:
    """Refuse a definition that a stage begun in `folder` contradicts; what no stage has read yet may change."""
    before, wanted = deciding(begun or {}), deciding(wanted)
    changed = {name for name, value in wanted.items() if before.get(name, ...) != value} - {"baseline"}
    if changed - {name for names in SETTINGS.values() for name in names}:
        raise ValueError(
            f"{folder} holds another experiment (see experiment.json there): delete it, give this one a variant, or "
            f"set URANK_RUNS to another folder of runs"
        )
    read = [f"{stage}.{kind}" for stage, names in SETTINGS.items() for kind in ("json", "ckpt") if changed & set(names)]
    if kept := [name for name in read if (folder / name).exists()]:
        raise ValueError(
            f"{folder} was run with another {' and '.join(sorted(changed))} (see experiment.json there): delete "
            f"{' and '.join(kept)} there to run that and what follows from it again, or give this experiment a variant"
        )


def deciding(definition: dict) -> dict:
    """A definition without what its recipes say of speed alone."""
    return {name: what_is_fitted(value) if name in FITS else value for name, value in definition.items()}


def finished_stages(folder: Path) -> list[dict]:
    return [read_json(file) for name in STAGES if (file := folder / f"{name}.json").exists()]


def begun_definition(begun: object) -> dict | None:
    """The definition in an experiment.json, with defaults for what experiments did not have when it was written."""
    try:
        return as_json(asdict(Experiment.from_dict(begun["definition"])))
    except (KeyError, TypeError, ValueError):  # whatever it is, it is no experiment
        return None


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one."""
    if name == "auto":
        return own_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error


def assemble(experiment: Experiment, stages: dict[str, dict]) -> dict:
    """The record's content from the stages' results."""
    train, search, finetune = stages["train"], stages["search"], stages["finetune"]
    baseline = stages.get("baseline", dict(accuracy=None, history=[]))
    history = dict(train=train["history"], finetune=finetune["history"], baseline=baseline["history"])
    return dict(
        experiment=as_json(asdict(experiment)),
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
        made={name: {key: stage["made"][key] for key in ("device", "date", "code")} for name, stage in stages.items()},
        versions=versions_of(stages.values()),
    )


def versions_of(stages: Iterable[dict]) -> dict[str, str]:
    """By package the version that computed the stages, or the versions, where a run was gone on with by others.

    Stages that this package computed before it noted them have none.
    """
    found: dict[str, list[str]] = {}
    for stage in stages:
        for package, number in stage["made"].get("versions", {}).items():
            found.setdefault(package, []).extend(number.split(", "))
    return {package: joined(numbers) for package, numbers in found.items()}


def seconds_of(history: list[dict]) -> float:
    """How long a fit took, whatever number of times it was interrupted."""
    return round(sum(epoch["seconds"] for epoch in history), 1)
