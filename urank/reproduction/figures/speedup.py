"""What fewer multiplications are worth: how fast the compact network is beside the original."""

from collections.abc import Iterable
from statistics import mean

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.selection import place, without_variants
from urank.reproduction.figures.style import styled
from urank.reproduction.figures.tables import SAME, speed_ratios
from urank.reproduction.record import Record

TIMED = ["precision", "batch"]


def speedup_table(records: Iterable[Record]) -> pd.DataFrame:
    """Images a second of the compact network over those of the original, variants left out.

    Returns:
        A row for each data set, network and device, a column for each precision and number of images a batch; the mean
        where several runs timed the same, nan where none did.
    """
    ratios: dict[tuple, list[float]] = {}
    for record in without_variants(records):
        for where, ratio in speed_ratios(record).items():
            ratios.setdefault((*place(record), *where), []).append(ratio)
    index = pd.MultiIndex.from_tuples(ratios, names=[*SAME, "device", *TIMED])
    means = pd.Series([mean(several) for several in ratios.values()], index, dtype=float)
    return means.unstack(TIMED, sort=False).sort_index(axis="columns", ascending=[False, True])


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
