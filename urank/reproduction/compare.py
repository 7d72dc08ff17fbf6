"""How far two records agree, for example a repeated run and the committed one."""

from dataclasses import asdict

import pandas as pd

from urank.reproduction.figures.runs import devices
from urank.reproduction.figures.tables import measured_row, with_labels
from urank.reproduction.record import Record

COLUMNS = ["one", "other", "difference"]


def measured(one: Record, other: Record) -> pd.DataFrame:
    """Return the columns of Table 3 as rows: accuracies and MLU in percent, params and MACs as shares."""
    frame = with_labels(pd.DataFrame([measured_row(one), measured_row(other)])).T
    return frame.assign(difference=frame[1] - frame[0]).set_axis(COLUMNS, axis=1)


def ranks(one: Record, other: Record) -> pd.DataFrame:
    """Return the utilized rank of every layer in both.

    Raises:
        ValueError: the records have different layers.
    """
    columns = [record.plan.to_frame().set_index("layer")["rank"] for record in (one, other)]
    if not columns[0].index.equals(columns[1].index):
        raise ValueError(f"{one.experiment.name} and {other.experiment.name} have different layers: nothing to compare")
    return pd.concat(columns, axis=1).assign(difference=columns[1] - columns[0]).set_axis(COLUMNS, axis=1)


def settings(one: Record, other: Record) -> pd.DataFrame:
    """Return the settings in which the experiments differ, "train.epochs" for example, and the devices."""
    columns = [pd.json_normalize(asdict(record.experiment)).iloc[0] for record in (one, other)]
    frame = pd.concat(columns, axis=1).map(str).set_axis(COLUMNS[:2], axis=1)
    frame.loc["device"] = [devices([one]), devices([other])]
    return frame[(frame["one"] != frame["other"]) | (frame.index == "device")]


def report(one: Record, other: Record) -> str:
    """Return three tables as text: different settings, measured numbers, and the layers whose ranks differ."""
    compared = ranks(one, other)
    differing = compared[compared["difference"] != 0]
    return "\n\n".join(
        [
            settings(one, other).to_string(),
            measured(one, other).to_string(float_format="{:.2f}".format, na_rep="-"),
            f"ranks: {len(differing)} of {len(compared)} differ",
            *([differing.to_string()] if len(differing) else []),
        ]
    )
