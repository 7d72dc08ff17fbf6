"""Run an experiment from training to a record, or what is left of it.

Results that exist are kept and used, also those that another version of the code computed; the record names these.
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
from urank.distributed import is_first, join, own_device, wait
from urank.files import delete_unfinished, read_json, write_json
from urank.reproduction.experiment import Experiment, as_json, check_start
from urank.reproduction.provenance import code_digest, file_digest
from urank.reproduction.record import Record
from urank.reproduction.run_folder import SETTINGS, RunFolder, joined
from urank.reproduction.stages import STAGES, stages_of
from urank.training.recipe import result_fields

RECIPES = ("train", "finetune")  # the settings that are recipes
MADE = ("device", "date", "code", "commit", "clean")  # what a record tells about the computation of each stage


def run(
    experiment: Experiment,
    folder: Path | str,
    device: str = "auto",
    progress: bool = True,
    recompute: bool = False,
    start: Path | str | None = None,
    deadline: float | None = None,
) -> Record:
    """Run `experiment`, or what is left of it, in `folder` and return its record, which is saved as `record.json`.

    Args:
        device: "cpu", "cuda", ... or "auto" for a GPU if there is one.
        progress: show progress bars.
        recompute: delete results in `folder` that another version of the code computed, or that started from other
            weights. By default such results are kept and named on stderr.
        start: folder of the experiment that this one starts from.
        deadline: value of `time.monotonic()` by which to stop. No stage is started after it, and no epoch or searched
            layer, except the first, that is expected to end after it.

    Raises:
        ValueError: the folder contains another experiment or a stage that was run with other settings, a name or option
            is unknown, or `start` is not the folder of the experiment to start from.
        OutOfTime: the deadline has passed and something is left, or another run still works in `folder`. The next call
            resumes there.
    """
    folder = Path(folder).resolve()
    join()
    weights = starting_weights(experiment, start)
    with alone_in(folder, deadline):
        if is_first():
            claim(folder, experiment, recompute, weights)
            delete_unfinished(folder)
        run = RunFolder(experiment, folder, pick_device(device), progress, weights, deadline)
        stages = {name: run.stage(name, STAGES[name]) for name in stages_of(experiment)}
        record = Record(assemble(experiment, stages) | dict(weights=file_digest(folder / "original.safetensors")))
        record.save(folder / "record.json")
    return record


def delete_run(folder: Path) -> None:
    """Delete all results in `folder`, once no other run works there."""
    join()
    with alone_in(folder, None):
        if is_first() and folder.exists():
            shutil.rmtree(folder)
    wait()


@contextmanager
def alone_in(folder: Path, deadline: float | None) -> Iterator[None]:
    """Lock `folder` against other runs; wait until the deadline while another run works there."""
    if not is_first():  # the first process locks for all
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # the system releases it when a process is killed
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{folder}: waiting for another run to finish there", file=sys.stderr)
        wait_for(lock, folder, deadline)
    try:
        yield
    finally:
        lock.release()


def wait_for(lock: FileLock, folder: Path, deadline: float | None) -> None:
    longest = -1 if deadline is None else max(0.0, deadline - time.monotonic())  # -1: wait without limit
    try:
        lock.acquire(timeout=longest)
    except Timeout:
        raise OutOfTime(f"another run still works in {folder}") from None


def starting_weights(experiment: Experiment, start: Path | str | None) -> Path | None:
    """Return the file of the weights that `experiment` starts from; None for seeded weights."""
    if (experiment.start is None) != (start is None):
        wanted = f"the folder of {experiment.start}" if experiment.start else "None, because its weights are seeded"
        raise ValueError(f"{experiment.name}: start must be {wanted}, got {start}")
    if start is None:
        return None
    start = Path(start)
    if not (start / "train.json").exists():
        raise ValueError(f"{experiment.name} starts from {experiment.start}, which was not trained in {start}")
    check_start(experiment, Experiment.from_dict(read_json(start / "experiment.json")["definition"]))
    return start / "original.safetensors"


def claim(folder: Path, experiment: Experiment, recompute: bool, weights: Path | None = None) -> None:
    """Write `experiment.json`, which names the experiment of `folder`; raise an error if it holds another one."""
    path, content = folder / "experiment.json", identity_of(experiment, weights)
    if not has_results(folder):
        write_json(path, content)
        (folder / "labels.json").unlink(missing_ok=True)
    begun = read_json(path) if path.exists() else {}  # missing if a deletion was killed halfway
    if begun:
        check_settings(folder, begun_definition(begun), content["definition"])
    same_start = begun.get("start") == content["start"]
    if recompute and (is_outdated(folder) or not same_start):
        shutil.rmtree(folder)
        write_json(path, content)
    elif not begun:
        raise ValueError(
            f"{folder} contains results but no experiment.json that names them; use --fresh to start again"
        )
    elif not same_start:
        raise ValueError(f"{folder} started from other weights of {experiment.start}; use --fresh to start again")
    else:
        if begun_definition(begun) != content["definition"]:
            (folder / "record.json").unlink(missing_ok=True)  # it describes the earlier definition
            write_json(path, begun | dict(definition=content["definition"]))
        name_kept_results(folder, experiment)


def identity_of(experiment: Experiment, weights: Path | None) -> dict:
    """Return the content of `experiment.json`: the definition, the code that began the run, the starting weights."""
    start = None if weights is None else file_digest(weights)
    return dict(definition=as_json(asdict(experiment)), code=code_digest(), start=start)


def has_results(folder: Path) -> bool:
    """Return whether a stage was finished in `folder`, or a part of one."""
    return bool(finished_stages(folder)) or any(folder.glob("*.ckpt"))


def is_outdated(folder: Path) -> bool:
    """Return whether another version of the code computed anything in `folder`."""
    codes = {stage["made"]["code"] for stage in finished_stages(folder).values()}
    codes |= {maker["code"] for stage in folder.glob("*.begun") for maker in read_json(stage)["makers"]}
    if (folder / "experiment.json").exists():
        codes.add(read_json(folder / "experiment.json").get("code"))
    return codes != {code_digest()}


def name_kept_results(folder: Path, experiment: Experiment) -> None:
    """Print which results another version of the code computed."""
    others = {name: stage["made"] for name, stage in finished_stages(folder).items() if is_from_other_code(stage)}
    if others:
        commits = joined(made.get("commit") or f"code {made['code']}" for made in others.values())
        print(
            f"{experiment.name}: keeping {', '.join(others)}, computed by another version of the code ({commits}); "
            "--fresh recomputes them",
            file=sys.stderr,
        )


def is_from_other_code(stage: dict) -> bool:
    return stage["made"]["code"] != code_digest()


def check_settings(folder: Path, begun: dict | None, wanted: dict) -> None:
    """Raise an error if a stage in `folder` used other settings; those that no stage has used yet may change."""
    before, wanted = deciding(begun or {}), deciding(wanted)
    changed = {name for name, value in wanted.items() if before.get(name, ...) != value} - {"baseline"}
    if changed - {name for names in SETTINGS.values() for name in names}:
        raise ValueError(
            f"{folder} contains another experiment (see experiment.json there): use --fresh to delete it, give this "
            "one a variant, or set URANK_RUNS to another folder"
        )
    read = [f"{stage}.{kind}" for stage, names in SETTINGS.items() for kind in ("json", "ckpt") if changed & set(names)]
    if kept := [name for name in read if (folder / name).exists()]:
        raise ValueError(
            f"{folder} was run with another {' and '.join(sorted(changed))} (see experiment.json there): delete "
            f"{' and '.join(kept)} there to recompute that and all that depends on it, or give this one a variant"
        )


def deciding(definition: dict) -> dict:
    """Return a definition without the fields of its recipes that affect only speed."""
    return {name: result_fields(value) if name in RECIPES else value for name, value in definition.items()}


def finished_stages(folder: Path) -> dict[str, dict]:
    """Return the results of the finished stages in `folder` by name."""
    return {name: read_json(file) for name in STAGES if (file := folder / f"{name}.json").exists()}


def begun_definition(begun: object) -> dict | None:
    """Return the definition in an experiment.json, with defaults for fields that were added later; None if invalid."""
    try:
        return as_json(asdict(Experiment.from_dict(begun["definition"])))
    except (KeyError, TypeError, ValueError):
        return None


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU if there is one."""
    if name == "auto":
        return own_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either one
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error


def assemble(experiment: Experiment, stages: dict[str, dict]) -> dict:
    """Return the content of the record from the results of the stages."""
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
        made={name: {key: stage["made"].get(key) for key in MADE} for name, stage in stages.items()},
        other_code=[name for name, stage in stages.items() if is_from_other_code(stage)],
        versions=versions_of(stages.values()),
    )


def versions_of(stages: Iterable[dict]) -> dict[str, str]:
    """Return the versions of each package that computed the stages, several if the run was resumed with others.

    Stages that early versions of urank computed have none.
    """
    found: dict[str, list[str]] = {}
    for stage in stages:
        for package, number in stage["made"].get("versions", {}).items():
            found.setdefault(package, []).extend(number.split(", "))
    return {package: joined(numbers) for package, numbers in found.items()}


def seconds_of(history: list[dict]) -> float:
    """Return the seconds of a fit, without interruptions."""
    return round(sum(epoch["seconds"] for epoch in history), 1)
