"""What `urank reproduce` would do: which experiments run, which resume, which results are reused, and why."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from urank.files import read_json
from urank.reproduction.experiment import Experiment, as_json
from urank.reproduction.profiles import Profile, folder_of
from urank.reproduction.run_folder import READS, is_finished
from urank.reproduction.runner import (
    begun_definition,
    check_settings,
    finished_stages,
    has_results,
    is_from_other_code,
    is_outdated,
)
from urank.reproduction.stages import STAGES, stages_of

COLUMNS = ["experiment", "action", "stages", "why"]


def preview(profile: Profile, names: Iterable[str], fresh: bool = False) -> pd.DataFrame:
    """Return one row per experiment: its name, "run", "resume", "reuse" or "refuse", which stages, and why.

    Experiments that others start from come first, as they are run first.
    """
    rows: dict[str, dict] = {}
    for name in with_starts(profile, names):
        experiment, folder = profile.find(name), folder_of(profile.name, name)
        restarted = experiment.start if rows.get(experiment.start or "", {}).get("trains") else None
        rows[name] = dict(experiment=name) | outlook(experiment, folder, profile, fresh and name in names, restarted)
    return pd.DataFrame(rows.values(), columns=COLUMNS)


def with_starts(profile: Profile, names: Iterable[str]) -> list[str]:
    """Return `names`, each after the experiments that it starts from."""
    ordered: dict[str, None] = {}
    for name in names:
        start = profile.find(name).start
        ordered |= dict.fromkeys([*(with_starts(profile, [start]) if start else []), name])
    return list(ordered)


def outlook(experiment: Experiment, folder: Path, profile: Profile, fresh: bool, restarted: str | None) -> dict:
    """Return what would happen to one experiment; `trains` tells whether its network would be trained again."""
    everything = dict(action="run", stages="all", trains=True)
    if not has_results(folder):
        return everything | dict(why="not started")
    if fresh:
        return everything | dict(why=f"--fresh deletes {duration(seconds_spent(folder))} of computation")
    if profile.recompute_on_code_change and is_outdated(folder):
        return everything | dict(why=f"the code has changed since, and profile {profile.name} recomputes")
    if restarted is not None:
        if profile.recompute_on_code_change:
            return everything | dict(why=f"starts from {restarted}, which is trained again")
        return dict(action="refuse", stages="", why=f"started from other weights of {restarted}; use --fresh")
    begun = folder / "experiment.json"
    try:
        definition = begun_definition(read_json(begun)) if begun.exists() else None
        check_settings(folder, definition, as_json(asdict(experiment)))
    except ValueError as error:
        return dict(action="refuse", stages="", why=str(error))
    return remaining(experiment, folder)


def remaining(experiment: Experiment, folder: Path) -> dict:
    """Return which stages are left of a run that may be continued."""
    left = stages_left(experiment, folder)
    others = [name for name, stage in finished_stages(folder).items() if name not in left and is_from_other_code(stage)]
    spent = f"{duration(seconds_spent(folder))} of computation"
    kept = f"{spent} kept" + (f", {', '.join(others)} by another version of the code" if others else "")
    if not left:
        return dict(action="reuse", stages="all", why=kept)
    started = [name for name in left if (folder / f"{name}.ckpt").exists()]
    why = f"{started[0]} has a checkpoint" if started else f"{left[0]} was not computed"
    return dict(action="resume", stages=", ".join(left), why=f"{why}; {kept}", trains="train" in left)


def stages_left(experiment: Experiment, folder: Path) -> list[str]:
    """Return the stages without a result, and those that depend on them."""
    left: list[str] = []
    for name in stages_of(experiment):
        if not is_finished(folder, name) or READS.get(name) in left:
            left.append(name)
    return left


def stage_states(experiment: Experiment, folder: Path) -> dict[str, str]:
    """Return what an experiment starts from, and "done", "-" or "" (no such stage) for each stage."""
    states = dict(start=experiment.start or "") | dict.fromkeys(STAGES, "")
    for name in stages_of(experiment):
        states[name] = "done" if (folder / f"{name}.json").exists() else "-"
    return states


def seconds_spent(folder: Path) -> float:
    """Return how long the results in `folder` took to compute, including stages that are not finished."""
    finished = sum(stage.get("seconds", 0.0) for stage in finished_stages(folder).values())
    return finished + sum(read_json(begun)["seconds"] for begun in folder.glob("*.begun"))


def duration(seconds: float) -> str:
    """Format seconds for a person: "42 s", "3 min", "5 h 10 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
