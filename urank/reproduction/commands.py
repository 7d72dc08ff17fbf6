"""The commands of the reproduction: reproduce, status, publish, show, compare."""

import sys
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from urank.deadline import OutOfTime, duration
from urank.distributed import is_first, join, pick_device, processes, wait
from urank.errors import UNFINISHED, USER_ERRORS, sentence
from urank.plan import NOT_RECORDED
from urank.reproduction import compare as record_comparison
from urank.reproduction import profiles
from urank.reproduction import status as paper_status
from urank.reproduction.cost_estimates import basis
from urank.reproduction.figures import prepared_recipes
from urank.reproduction.preview import preview, seconds_spent, stage_states
from urank.reproduction.profiles import folder_of, load_profile, profile_names
from urank.reproduction.record import Record
from urank.reproduction.requirements import NOTES, requirements
from urank.reproduction.runner import delete_run, has_results

Profile = Annotated[str, typer.Option(help=f"Set of experiments, a file in profiles/: {', '.join(profile_names())}.")]
Only = Annotated[
    list[str] | None,
    typer.Option(help='Run only this experiment: dataset/network, network/dataset or "cifar10/*". Repeatable.'),
]
Seeds = Annotated[str | None, typer.Option(help="Repeat each experiment with these seeds, for example 0,1,2.")]


def reproduce(
    profile: Profile = "quick",
    only: Only = None,
    seeds: Seeds = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU if there is one.")] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete existing results first. Says what they are and how long they took.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would run, resume or be reused, and what ImageNet requires; then stop."
        ),
    ] = False,
    time_budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which no stage, epoch or searched layer is started. What is running is finished. "
            "Exit status 75 means that something is left."
        ),
    ] = None,
) -> None:
    """Run a profile's experiments, or what is left of them, and write a record for each.

    Results that exist are reused, also those of another version of the code. A run that was killed, or that reached its
    time budget, resumes where it stopped. If an experiment fails, the others are still run.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    loaded, failed = load_profile(profile), []
    names = loaded.names(only or (), parse_seeds(seeds))
    if dry_run:
        typer.echo(left_aligned(preview(loaded, names, fresh)))
        needed = requirements(loaded, names, fresh)
        if len(needed):
            typer.echo(f"\n{left_aligned(needed)}\n\n{NOTES}\n{basis()}")
        return
    pick_device(device)
    if fresh:
        delete_results(profile, names)
    for number, name in enumerate(names):
        try:
            record = profiles.reproduce(profile, name, device, deadline)
        except OutOfTime as stopped:
            left, command = ", ".join(failed + names[number:]), "the same command" + " without --fresh" * fresh
            say(f"The time budget is used up: {stopped}. To finish {left}, run {command} again.")
            raise typer.Exit(UNFINISHED) from None
        except USER_ERRORS as error:
            if len(names) == 1 or processes()[1] > 1:  # the other processes may be waiting for this one
                raise
            typer.echo(sentence(error, f"{name}: "), err=True)
            failed.append(name)
        else:
            say(f"{summary(name, record)}\n  record: {folder_of(profile, name) / 'record.json'}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")


def delete_results(profile: str, names: list[str]) -> None:
    """Say what `--fresh` deletes and how long it took to compute, ask at a terminal, and delete it."""
    join()
    folders = {name: folder_of(profile, name) for name in names}
    spent = {name: seconds_spent(folder) for name, folder in folders.items() if has_results(folder)}
    for name, seconds in spent.items():
        say(f"--fresh deletes {folders[name]}, which took {duration(seconds)} to compute.")
    if spent and sys.stdin.isatty() and processes()[1] == 1:
        typer.confirm(f"Delete {duration(sum(spent.values()))} of computation?", abort=True)
    wait()  # every process has read what is there
    for name in spent:
        delete_run(folders[name])


def left_aligned(frame: pd.DataFrame) -> str:
    """Format a table of texts with left-aligned columns."""
    widths = {column: max(len(column), *frame[column].str.len()) for column in frame}
    rows = [frame.columns, *frame.itertuples(index=False)]
    return "\n".join("  ".join(map(str.ljust, row, widths.values())).rstrip() for row in rows)


def say(text: str) -> None:
    """Print from the first process only."""
    if is_first():
        typer.echo(text)


def parse_seeds(text: str | None) -> list[int]:
    """Return the seeds in "0,1,2"; none for None."""
    if text is not None and not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"seeds must be whole numbers separated by commas, such as 0,1,2; got {text!r}")
    return [] if text is None else [int(part) for part in text.split(",")]


def status(profile: Profile = "quick", seeds: Seeds = None) -> None:
    """Compare the committed records with the paper, and list which stages of a profile are done."""
    loaded, compared = load_profile(profile), paper_status.table()
    measured = paper_status.measured(compared).drop(columns=["needs", "page", "dataset"])
    typer.echo(measured.to_string(index=False, na_rep="-", float_format="{:.4g}".format))
    typer.echo(paper_status.predictors(compared).to_string(float_format="{:.2f}".format))
    typer.echo(paper_status.summary(compared) + "\n")
    missing = compared[compared["runs"] == 0]
    width = missing["item"].str.len().max()
    typer.echo("\n".join(missing["item"].str.ljust(width) + "  " + missing["needs"]))
    typer.echo(f"{basis()}\n")
    prepared = prepared_recipes(loaded.experiments)
    if len(prepared):
        typer.echo(f"Fine-tuning on ImageNet, once profile {profile} sets `epochs`:\n{prepared.to_string()}\n")
    names = loaded.names(seeds=parse_seeds(seeds))
    rows = {name: stage_states(loaded.find(name), folder_of(profile, name)) for name in names}
    typer.echo(pd.DataFrame(rows).T.to_string())


def publish(
    names: Annotated[list[str], typer.Argument(help="Experiments, as in reproduce --only.")], profile: Profile
) -> None:
    """Copy records of finished experiments to data/records/, where the book reads them."""
    chosen = load_profile(profile).names(names)
    unfinished = [name for name in chosen if not (folder_of(profile, name) / "record.json").exists()]
    published = [name for name in chosen if name not in unfinished]
    for name in published:
        typer.echo(profiles.publish(profile, name))
    committed = profiles.recorded()
    for note in dict.fromkeys(note for name in published for note in paper_status.outdated(name, committed)):
        typer.echo(f"note: {note}", err=True)
    if unfinished:
        raise ValueError(f"{', '.join(unfinished)}: no record in {folder_of(profile, '')} yet; run `urank reproduce`")


def show(record: Annotated[Path, typer.Argument(help="A record.json, or a file in data/records/.")]) -> None:
    """Print the layers and the totals of a record, and how it was computed."""
    loaded = Record.load(record)
    typer.echo(loaded.plan.to_frame().to_string(index=False, formatters={"utilization": "{:.3f}".format}))
    typer.echo(summary(loaded.experiment.name, loaded))
    typer.echo(provenance_line(loaded))


def compare(
    one: Annotated[Path, typer.Argument(help="A record.json, or a file in data/records/.")],
    other: Annotated[Path, typer.Argument(help="Another record of the same network.")],
) -> None:
    """Compare two records of one network: settings, measurements and ranks."""
    typer.echo(record_comparison.report(Record.load(one), Record.load(other)))


def provenance_line(record: Record) -> str:
    """Return one line that says how probes were decided and which code computed the record."""
    plan, commits = record.plan, {made.get("commit") or NOT_RECORDED for made in record.made.values()}
    clean = {made.get("clean") for made in record.made.values()}
    tree = "clean tree" if clean == {True} else "modified tree" if False in clean else f"tree {NOT_RECORDED}"
    return (
        f"probes: {plan.evaluation}, images in {plan.precision}, urank {plan.version}; "
        f"commit {', '.join(sorted(commits))} ({tree})"
    )


def summary(name: str, record: Record) -> str:
    """Return one line with the accuracies, MLU and savings of a record."""
    accuracy = record.accuracy
    finetuned = f"-> {accuracy.finetuned:.2f} % fine-tuned" if record.finetuned else "(not fine-tuned)"
    return (
        f"{name}: {accuracy.original:.2f} % -> {accuracy.decomposed:.2f} % decomposed "
        f"{finetuned}; "
        f"MLU {100 * record.plan.mlu:.1f} % (W: {100 * record.plan.weight_mlu:.1f} %); "
        f"params x {record.params_ratio:.2f}, MACs x {record.macs_ratio:.2f}"
    )


COMMANDS = (reproduce, status, publish, show, compare)
