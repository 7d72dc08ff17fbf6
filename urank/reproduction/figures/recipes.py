"""Table 2: the hyperparameters that the paper prints, and the recipes that this project runs."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper
from urank.reproduction.experiment import Experiment
from urank.reproduction.figures.style import styled
from urank.training.recipe import Recipe

IMPOSSIBLE = "background-color: #f6d5d0; color: #6b1a10"


def printed_table2() -> Styler:
    """Return the printed grid; illegible cells are named, and a weight decay of 1 or more is marked."""
    grid = paper.table2()
    marks = grid.copy().astype(str).map(lambda cell: "")
    marks.loc["Weight Decay"] = [IMPOSSIBLE * (max(numbers(cell)) >= 1) for cell in grid.loc["Weight Decay"]]
    return styled(grid.replace("", "(not legible)"), "table2-printed", text=True).apply(lambda _: marks, axis=None)


def numbers(cell: str) -> list[float]:
    """Return the numbers in a printed cell.

    >>> numbers("[0.01, 0.05]")
    [0.01, 0.05]
    """
    return [float(number) for number in re.findall(r"[0-9.]+", cell)]


def recipe_fields(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return one row per fit that is run, with the fields of `Recipe` in which the fits differ."""
    frame = every_field(experiments)
    differing = frame.drop(columns=list(shared_fields(experiments).columns))
    return differing.rename(columns=lambda name: name.replace("_", " "))  # a header that can break its line


def shared_fields(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return the fields of `Recipe` that have one value in all of several fits, as one row."""
    frame = every_field(experiments)
    same = [name for name, column in frame.items() if len(column) > 1 == column.nunique()]
    return frame[same].head(1).set_axis(["all fits"][: len(frame)])


def prepared_recipes(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return the recipes that experiments on ImageNet would be fine-tuned with, one column per recipe.

    Epochs are those of Table 2 if an experiment has none. Only the fields that differ from the defaults. A recipe has
    the name of its column in Table 2; if there are several for one column, each has the name of its first experiment.
    """
    found: dict[tuple[str, Recipe], str] = {}
    for name, one in experiments.items():
        if one.dataset == "imagenet-1k":
            recipe = replace(one.finetune, epochs=one.finetune.epochs or paper.finetuning_epochs(one.network))
            found.setdefault((paper.recipe_column(one.network), recipe), name)
    columns = [column for column, _ in found]
    titles = [column if columns.count(column) == 1 else name for (column, _), name in found.items()]
    frame = pd.DataFrame({title: asdict(recipe) for title, (_, recipe) in zip(titles, found)}, dtype=object)
    default = pd.Series(asdict(Recipe(epochs=0)), dtype=object)
    chosen = [name for name in frame.index if any(value != default[name] for value in frame.loc[name])]
    return frame.loc[chosen].map(readable).rename(index=lambda name: name.replace("_", " "))


def every_field(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return one row per fit that is run, a column per field of `Recipe`."""
    fits = [(name, fit, getattr(one, fit)) for name, one in experiments.items() for fit in ("train", "finetune")]
    rows = [dict(experiment=name, fit=fit) | asdict(recipe) for name, fit, recipe in fits if recipe.epochs]
    frame = pd.DataFrame(rows, columns=["experiment", "fit", *(field.name for field in fields(Recipe))])
    return frame.set_index(["experiment", "fit"]).map(readable)


def readable(value: object) -> str:
    """Return a field's value as a page shows it."""
    if value is None or value in ((), []):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
