"""The command line: `urank ...` or `python -m urank ...`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from urank import profiles
from urank import status as paper_status
from urank.deadline import OutOfTime
from urank.profiles import load_profile, profile_names, run_folder
from urank.records import Experiment, Record
from urank.stages import STAGES, stages_of

app = typer.Typer(
    help="The utilized rank of a network's layers: reproduce the papers' figures and tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Profile = Annotated[str, typer.Option(help=f"A file of profiles/ without its ending: {', '.join(profile_names())}.")]
Only = Annotated[
    list[str] | None,
    typer.Option(help='Only this experiment, as dataset/network or network/dataset, or "cifar10/*"; may be repeated.'),
]
Seeds = Annotated[str | None, typer.Option(help="Each experiment with each of these seeds, for example 0,1,2.")]


@app.command()
def reproduce(
    profile: Profile = "quick",
    only: Only = None,
    seeds: Seeds = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    same_code: Annotated[
        bool, typer.Option(help="Delete and start again what other code began; else go on with it.")
    ] = False,
    time_budget: Annotated[
        float | None, typer.Option(help="After so many seconds begin no stage, epoch or searched layer.")
    ] = None,
) -> None:
    """Run a profile's experiments, or what is left of them, and write a record for each.

    A run that was killed, or that stopped for its time budget, goes on where it stopped when it is run again.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    names = load_profile(profile).names(only or (), parse_seeds(seeds))
    for number, name in enumerate(names):
        try:
            record = profiles.reproduce(profile, name, device, same_code, deadline)
        except OutOfTime as stopped:
            typer.echo(
                f"The time budget is spent: {stopped}. To be finished by the same command: {', '.join(names[number:])}"
            )
            return
        typer.echo(f"{summary(name, record)}\n  record: {run_folder(profile, name) / 'record.json'}")


def parse_seeds(text: str | None) -> list[int]:
    """Seeds from "0,1,2"; none where nothing is said."""
    if text is not None and not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"seeds are whole numbers from 0 with commas between them (0,1,2), not {text!r}")
    return [] if text is None else [int(part) for part in text.split(",")]


@app.command()
def status(profile: Profile = "quick", seeds: Seeds = None) -> None:
    """How far the committed records are from the paper, and which stages of a profile have been run."""
    loaded, compared = load_profile(profile), paper_status.table()
    measured = compared[compared["verdict"] != "not run"].drop(columns=["needs", "page"])
    typer.echo(measured.to_string(index=False, na_rep="-", float_format="{:.4g}".format))
    typer.echo(paper_status.summary(compared).replace("**", "") + "\n")
    missing = compared[compared["verdict"] == "not run"]
    width = missing["item"].str.len().max()
    typer.echo("\n".join(missing["item"].str.ljust(width) + "  " + missing["needs"]) + "\n")
    names = loaded.names(seeds=parse_seeds(seeds))
    rows = {name: stage_states(loaded.find(name), run_folder(profile, name)) for name in names}
    typer.echo(pd.DataFrame(rows).T.to_string())


def stage_states(experiment: Experiment, folder: Path) -> dict[str, str]:
    """What an experiment starts from, and "done" or "-" for each of its stages, nothing for one it does not have."""
    states = dict(start=experiment.start or "") | dict.fromkeys(STAGES, "")
    for name in stages_of(experiment):
        states[name] = "done" if (folder / f"{name}.json").exists() else "-"
    return states


@app.command()
def publish(names: Annotated[list[str], typer.Argument(help="Experiments, as --only.")], profile: Profile):
    """Copy the records of experiments that have been run to data/records/, where the book finds them."""
    for name in load_profile(profile).names(names):
        typer.echo(profiles.publish(profile, name))


@app.command()
def show(record: Annotated[Path, typer.Argument(help="A record.json, or a file of data/records/.")]) -> None:
    """Print what a record measured: its layers and its totals."""
    loaded = Record.load(record)
    typer.echo(loaded.plan.to_frame().to_string(index=False, formatters={"utilization": "{:.3f}".format}))
    typer.echo(summary(loaded.experiment.name, loaded))


def summary(name: str, record: Record) -> str:
    """One line: accuracies, MLU and savings of a record."""
    accuracy = record["accuracy"]
    finetuned = f"-> {accuracy['finetuned']:.2f} % fine-tuned" if record.finetuned else "(not fine-tuned)"
    return (
        f"{name}: {accuracy['original']:.2f} % -> {accuracy['decomposed']:.2f} % decomposed "
        f"{finetuned}; "
        f"MLU {100 * record.plan.mlu:.1f} % (W: {100 * record.plan.weight_mlu:.1f} %); "
        f"params x {record.params_ratio:.2f}, MACs x {record.macs_ratio:.2f}"
    )


def main() -> None:
    """Run the command line; what a person can mend is one sentence, not a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"urank: {' '.join(str(error).split())}")
