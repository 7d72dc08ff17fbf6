"""The command line: `urank ...` or `python -m urank ...`."""

import sys
from importlib.util import find_spec

import typer

from urank.cli_measure import measure_command
from urank.deadline import OutOfTime
from urank.errors import UNFINISHED, USER_ERRORS, sentence
from urank.memory import keep_freed_memory

EXTRA = ("accelerate", "filelock", "sklearn", "yaml")  # packages that the reproduction needs, beyond the library's

app = typer.Typer(
    help="Utilized ranks of neural networks: measure your own, or reproduce the papers' figures and tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("measure")(measure_command)
if all(find_spec(package) for package in EXTRA):
    from urank.reproduction.commands import COMMANDS

    for command in COMMANDS:
        app.command()(command)
else:
    app.info.epilog = "Install urank[reproduction] for the commands that reproduce the papers."


def main() -> None:
    """Run the command line; show errors that a user can correct as one sentence, not a traceback."""
    keep_freed_memory()
    try:
        app()
    except OutOfTime as stopped:
        print(f"The time budget is used up: {stopped}. The same command resumes.")
        sys.exit(UNFINISHED)
    except USER_ERRORS as error:
        sys.exit(sentence(error))
