"""How far two records agree: a run that was repeated, beside the committed one."""

import pandas as pd

from urank.reproduction.figures.tables import measured_row, with_labels
from urank.reproduction.record import Record

COLUMNS = ["one", "other", "difference"]


def measured(one: Record, other: Record) -> pd.DataFrame:
    """The columns of Table 3 as rows: accuracies and MLU in percent, params and MACs as shares, speed as a ratio."""
    frame = with_labels(pd.DataFrame([measured_row(one), measured_row(other)])).T
    return frame.assign(difference=frame[1] - frame[0]).set_axis(COLUMNS, axis=1)


def ranks(one: Record, other: Record) -> pd.DataFrame:
    """The utilized rank of every layer in both.

    Raises:
        ValueError: the records are of different layers.
    """
    columns = [record.plan.to_frame().set_index("layer")["rank"] for record in (one, other)]
    if not columns[0].index.equals(columns[1].index):
        raise ValueError(f"{one.experiment.name} and {other.experiment.name} have different layers: nothing to compare")
    return pd.concat(columns, axis=1).assign(difference=columns[1] - columns[0]).set_axis(COLUMNS, axis=1)


def run_otherwise(one: Record, other: Record) -> dict[str, tuple]:
    """The settings in which the experiments differ, "train.epochs" for example, with both values."""
    [first], [second] = (pd.json_normalize(record["experiment"]).to_dict("records") for record in (one, other))
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def report(one: Record, other: Record) -> str:
    """What was run otherwise, what was measured, and how many ranks differ."""
    compared = ranks(one, other)
    table = measured(one, other).to_string(float_format="{:.2f}".format, na_rep="-")
    return f"{settings_report(one, other)}\n{table}\n{ranks_report(compared)}"


def settings_report(one: Record, other: Record) -> str:
    differ = [f"{name} {first!r} and {second!r}" for name, (first, second) in run_otherwise(one, other).items()]
    devices = [record["made"]["search"]["device"] for record in (one, other)]
    return f"run {'otherwise: ' + ', '.join(differ) if differ else 'alike'}; on {devices[0]} and {devices[1]}"


def ranks_report(compared: pd.DataFrame) -> str:
    distance = compared["difference"].abs()
    if not distance.any():
        return f"ranks: all {len(compared)} equal"
    layer = distance.idxmax()
    first, second = compared.loc[layer, ["one", "other"]]
    return f"ranks: {(distance > 0).sum()} of {len(compared)} differ, most that of {layer} ({first} and {second})"
