"""The command line: `urank ...` or `python -m urank ...`."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from urank.deadline import OutOfTime
from urank.distributed import is_first, processes
from urank.memory import keep_freed_memory
from urank.reproduction import compare as record_comparison
from urank.reproduction import profiles
from urank.reproduction import status as paper_status
from urank.reproduction.experiment import Experiment
from urank.reproduction.profiles import folder_of, load_profile, profile_names
from urank.reproduction.record import Record
from urank.reproduction.runner import pick_device
from urank.reproduction.stages import STAGES, stages_of

MENDABLE = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)  # by who runs it: one sentence says what
UNFINISHED = os.EX_TEMPFAIL  # exit status 75: the same command goes on

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
        float | None,
        typer.Option(
            help="Seconds; begin no stage after them, and no epoch or searched layer that would end after them. What "
            "has begun is finished. Exit status 75 says that something is left."
        ),
    ] = None,
) -> None:
    """Run a profile's experiments, or what is left of them, and write a record for each.

    A run that was killed, or that stopped for its time budget, goes on where it stopped when it is run again. An
    experiment that fails does not keep the others from being run.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    names, failed = load_profile(profile).names(only or (), parse_seeds(seeds)), []
    pick_device(device)
    for number, name in enumerate(names):
        try:
            record = profiles.reproduce(profile, name, device, same_code, deadline)
        except OutOfTime as stopped:
            left = ", ".join(failed + names[number:])
            say(f"The time budget is spent: {stopped}. To be finished by the same command: {left}")
            raise typer.Exit(UNFINISHED) from None
        except MENDABLE as error:
            if len(names) == 1 or processes()[1] > 1:  # the other processes may be waiting for this one
                raise
            typer.echo(sentence(error, f"{name}: "), err=True)
            failed.append(name)
        else:
            say(f"{summary(name, record)}\n  record: {folder_of(profile, name) / 'record.json'}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")


def say(text: str) -> None:
    """Print it once, however many processes there are."""
    if is_first():
        typer.echo(text)


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
    typer.echo(paper_status.summary(compared) + "\n")
    missing = compared[compared["verdict"] == "not run"]
    width = missing["item"].str.len().max()
    typer.echo("\n".join(missing["item"].str.ljust(width) + "  " + missing["needs"]) + "\n")
    names = loaded.names(seeds=parse_seeds(seeds))
    rows = {name: stage_states(loaded.find(name), folder_of(profile, name)) for name in names}
    typer.echo(pd.DataFrame(rows).T.to_string())


def stage_states(experiment: Experiment, folder: Path) -> dict[str, str]:
    """What an experiment starts from, and "done" or "-" for each of its stages, nothing for one it does not have."""
    states = dict(start=experiment.start or "") | dict.fromkeys(STAGES, "")
    for name in stages_of(experiment):
        states[name] = "done" if (folder / f"{name}.json").exists() else "-"
    return states


@app.command()
def publish(names: Annotated[list[str], typer.Argument(help="Experiments, as --only.")], profile: Profile):
    """Copy the records of experiments that have been run to data/records/, where the book finds them.

    Of a pattern those that have been run; the others are named.
    """
    chosen = load_profile(profile).names(names)
    unfinished = [name for name in chosen if not (folder_of(profile, name) / "record.json").exists()]
    published = [name for name in chosen if name not in unfinished]
    for name in published:
        typer.echo(profiles.publish(profile, name))
    committed = profiles.recorded()
    for note in dict.fromkeys(note for name in published for note in paper_status.outdated(name, committed)):
        typer.echo(f"note: {note}", err=True)
    if unfinished:
        raise ValueError(f"{', '.join(unfinished)}: no record in {folder_of(profile, '')} yet; run to the end first")


@app.command()
def show(record: Annotated[Path, typer.Argument(help="A record.json, or a file of data/records/.")]) -> None:
    """Print what a record measured: its layers and its totals."""
    loaded = Record.load(record)
    typer.echo(loaded.plan.to_frame().to_string(index=False, formatters={"utilization": "{:.3f}".format}))
    typer.echo(summary(loaded.experiment.name, loaded))


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A record.json, or a file of data/records/.")],
    other: Annotated[Path, typer.Argument(help="Another, of the same network.")],
) -> None:
    """How far two records agree: what was run otherwise, what was measured, which ranks differ."""
    typer.echo(record_comparison.report(Record.load(one), Record.load(other)))


def summary(name: str, record: Record) -> str:
    """One line: accuracies, MLU and savings of a record."""
    accuracy = record.accuracy
    finetuned = f"-> {accuracy.finetuned:.2f} % fine-tuned" if record.finetuned else "(not fine-tuned)"
    return (
        f"{name}: {accuracy.original:.2f} % -> {accuracy.decomposed:.2f} % decomposed "
        f"{finetuned}; "
        f"MLU {100 * record.plan.mlu:.1f} % (W: {100 * record.plan.weight_mlu:.1f} %); "
        f"params x {record.params_ratio:.2f}, MACs x {record.macs_ratio:.2f}"
    )


def main() -> None:
    """Run the command line; what a person can mend is one sentence, not a traceback."""
    keep_freed_memory()
    try:
        app()
    except MENDABLE as error:
        sys.exit(sentence(error))


def sentence(error: BaseException, where: str = "") -> str:
    """An error in one line."""
    return f"urank: {where}{' '.join(str(error).split())}"
