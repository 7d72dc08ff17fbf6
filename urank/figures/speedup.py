"""What fewer multiplications are worth: how fast the compact network is beside the original."""

from collections.abc import Iterable

import pandas as pd
from pandas.io.formats.style import Styler

from urank.figures.contrasts import without_variants
from urank.figures.style import styled
from urank.records import Record

PLACE = ["dataset", "network", "device"]
TIMED = ["precision", "batch"]


def speedup_table(records: Iterable[Record]) -> pd.DataFrame:
    """Images a second of the compact network over those of the original, variants left out.

    Returns:
        A row for each data set, network and device, a column for each precision and number of images a batch; the mean
        where several runs timed the same, nan where none did.
    """
    timed = pd.DataFrame([row for record in without_variants(records) for row in timed_rows(record)])
    speeds = timed.pivot_table("images_per_second", [*PLACE, *TIMED, "seed"], "timed", sort=False)
    ratios = (speeds["compact"] / speeds["original"]).groupby([*PLACE, *TIMED], sort=False).mean()
    return ratios.unstack(TIMED, sort=False).sort_index(axis="columns", ascending=[False, True])


def timed_rows(record: Record) -> list[dict]:
    """The rows of a record's `latency`, and of which experiment they are."""
    experiment = record["experiment"]
    run = {name: experiment[name] for name in ("dataset", "network", "seed")}
    return [row | dict(timed=row["network"]) | run for row in record["latency"]]


def style_speedup(frame: pd.DataFrame, identifier: str) -> Styler:
    """The table as a page shows it."""
    flat = frame.set_axis([f"{precision}, {batch}" for precision, batch in frame.columns], axis="columns")
    return styled(flat, identifier, dict.fromkeys(flat.columns, "{:.2f}"))


def speedup_caption(frame: pd.DataFrame) -> str:
    """In how many of its rows the compact network is the faster one, in one paragraph of Markdown."""
    counts = [
        f"{precision}, {batch} a batch: in {(ratios > 1).sum()} of {len(ratios)}"
        for (precision, batch), ratios in ((column, frame[column].dropna()) for column in frame.columns)
    ]
    return f"The compact network is the faster one: {'; '.join(counts)}."
