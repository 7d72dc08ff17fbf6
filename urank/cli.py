"""The command line: `urank ...` or `python -m urank ...`."""

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from urank.experiments import STAGES, Record
from urank.profiles import load_profile, run_folder
from urank.profiles import reproduce as reproduce_one

app = typer.Typer(
    help="The utilized rank of a network's layers: reproduce the papers' figures and tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Profile = Annotated[str, typer.Option(help="A file of profiles/ without its ending: smoke, quick, cifar.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this experiment, as dataset/network; may be repeated.")]


@app.command()
def reproduce(
    profile: Profile = "quick",
    only: Only = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    same_code: Annotated[bool, typer.Option(help="Start again what other code has begun, not go on with it.")] = False,
) -> None:
    """Run a profile's experiments, or what is left of them, and write a record for each."""
    for name in only or load_profile(profile).experiments:
        record = reproduce_one(profile, name, device, same_code)
        typer.echo(f"{summary(name, record)}\n  record: {run_folder(profile, name) / 'record.json'}")


@app.command()
def status(profile: Profile = "quick") -> None:
    """Which stages of a profile's experiments have been run."""
    rows = {}
    for name in load_profile(profile).experiments:
        folder = run_folder(profile, name)
        stages = [stage.__name__.lstrip("_") for stage in STAGES]
        rows[name] = {stage: "done" if (folder / f"{stage}.json").exists() else "-" for stage in stages}
    typer.echo(pd.DataFrame(rows).T.to_string())


@app.command()
def show(record: Annotated[Path, typer.Argument(help="A record.json, or a file of data/records/.")]) -> None:
    """Print what a record measured: its layers and its totals."""
    loaded = Record.load(record)
    typer.echo(loaded.plan.to_frame().to_string(index=False, formatters={"utilization": "{:.3f}".format}))
    typer.echo(summary(loaded.experiment.name, loaded))


def summary(name: str, record: Record) -> str:
    """One line: accuracies, MLU and savings of a record."""
    accuracy = record["accuracy"]
    return (
        f"{name}: {accuracy['original']:.2f} % -> {accuracy['decomposed']:.2f} % decomposed "
        f"-> {accuracy['finetuned']:.2f} % fine-tuned; "
        f"MLU {100 * record.plan.mlu:.1f} % (W: {100 * record.plan.weight_mlu:.1f} %); "
        f"params x {record.params_ratio:.2f}, MACs x {record.macs_ratio:.2f}"
    )


def main() -> None:
    """Run the command line; what a person can mend is one sentence, not a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"urank: {' '.join(str(error).split())}")
