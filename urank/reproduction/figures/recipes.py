"""Table 2: the recipes that the paper prints, and those that the code uses."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper
from urank.reproduction.experiment import Experiment
from urank.reproduction.figures.style import styled
from urank.training.recipe import Recipe

HEADS = ("transformers, ImageNet", "ResNets, ImageNet", "CIFAR")  # inferred: the printed heads are not recovered
WRONG = "background-color: #f6d5d0; color: #6b1a10"


def paper_table2() -> Styler:
    """The printed grid with the cells named that are not legible, and the impossible one marked."""
    grid = printed_grid()
    shown = grid.replace("", "(not legible)")
    return styled(shown, "table2-printed", text=True).apply(
        lambda column: [WRONG if faulty(row, grid.loc[row, column.name]) else "" for row in grid.index]
    )


def printed_grid() -> pd.DataFrame:
    return paper.table2().set_axis(list(HEADS), axis="columns")


def faulty(hyperparameter: str, cell: str) -> bool:
    """True for a weight decay of 1 or more, thousands of times the usual."""
    return hyperparameter == "Weight Decay" and max(numbers(cell)) >= 1


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[0-9.]+", cell)]


def table2_caption() -> str:
    """Which cells of the printed grid cannot be used as they are, in one paragraph of Markdown."""
    grid = printed_grid()
    cells = [(row, head, grid.loc[row, head]) for row in grid.index for head in grid.columns]
    lost = [f"{row.lower()} ({head})" for row, head, cell in cells if cell == ""]
    wrong = [f"{row.lower()} {cell} ({head})" for row, head, cell in cells if faulty(row, cell)]
    return (
        f"{len(lost)} cells are not legible: {', '.join(lost)}. Impossible: {', '.join(wrong)}. A step "
        f"of SGD multiplies a weight by 1 - learning rate x weight decay; with the smallest values printed, "
        f"{100 * left_of_a_weight():.1f} % of it is left after 100 steps. The numbers would fit epochs at which a "
        f"learning rate drops."
    )


def left_of_a_weight(steps: int = 100) -> float:
    """The share of a weight that is left after `steps` of SGD with the smallest values that Table 2 has for CIFAR."""
    cifar = printed_grid()["CIFAR"]
    lr, decay = (min(numbers(cifar[name])) for name in ("Learning Rate", "Weight Decay"))
    return (1 - lr * decay) ** steps


def recipes(experiments: Mapping[str, Experiment], identifier: str = "recipes") -> Styler:
    """The recipes of experiments, a row for each fit that is run: the fields in which the fits differ."""
    frame = recipe_rows(experiments)
    table = styled(frame, identifier).hide(list(shared(frame)), axis="columns")
    return table.format_index(lambda name: name.replace("_", " "), axis="columns")  # a head that can break its line


def recipes_caption(experiments: Mapping[str, Experiment]) -> str:
    """The fields that `recipes` leaves out, in one paragraph of Markdown; "" where there are none."""
    same = shared(recipe_rows(experiments))
    return f"In all of them: {', '.join(f'`{name}` {value}' for name, value in same.items())}." if same else ""


def shared(frame: pd.DataFrame) -> dict[str, str]:
    """The columns that hold one value in all of several rows, with it."""
    return {name: column.iloc[0] for name, column in frame.items() if len(column) > 1 == column.nunique()}


def recipe_rows(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """A row for each fit that is run, a column for each field of `Recipe`."""
    fits = [
        (name, stage, recipe)
        for name, experiment in experiments.items()
        for stage, recipe in (("train", experiment.train), ("finetune", experiment.finetune))
        if recipe.epochs
    ]
    rows = [dict(experiment=name, fit=stage) | asdict(recipe) for name, stage, recipe in fits]
    frame = pd.DataFrame(rows, columns=["experiment", "fit", *(field.name for field in fields(Recipe))])
    return frame.set_index(["experiment", "fit"]).map(readable)


def readable(value: object) -> str:
    if value is None or value in ((), []):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
