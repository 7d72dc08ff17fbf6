"""What another seed changes: one experiment, run from several."""

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.finetuning import beside_paper
from urank.reproduction.figures.selection import common, seed
from urank.reproduction.figures.style import styled
from urank.reproduction.figures.tables import FORMATS, measured_row, off, with_labels
from urank.reproduction.record import Record

EXACT = {label: "{:+.2f}" if label == "change" else "{:.2f}" for label in FORMATS}
DEVIATION = "standard deviation"


def repetition_table(records: Sequence[Record]) -> pd.DataFrame:
    """The columns of Table 3 for each seed of one experiment, two at least; below them mean and standard deviation."""
    frame = by_seed(records)
    numbers = pd.DataFrame({"mean": frame.mean(skipna=False), DEVIATION: frame.std(skipna=False)}).T
    return with_labels(pd.concat([frame, numbers])).rename_axis("seed")


def by_seed(records: Sequence[Record]) -> pd.DataFrame:
    return pd.DataFrame([measured_row(record) for record in records], index=map(seed, records))


def style_repetition(frame: pd.DataFrame, identifier: str) -> Styler:
    """A table of this module as a page shows it."""
    deviation = pd.IndexSlice[[DEVIATION], :]  # has no sign
    return styled(frame, identifier, EXACT).format("{:.2f}", na_rep="–", subset=deviation)


def repetition_caption(records: Sequence[Record]) -> str:
    """What the table says, in one paragraph of Markdown."""
    frame = by_seed(records)
    return (
        f"**{common(records)}.** Over {len(records)} seeds, as mean and standard deviation, the original reaches "
        f"{interval(frame['original_top1'])} % and the MLU is {interval(frame['mlu'])} %."
        f"{after_finetuning(frame)}{beside_paper(records[0])}"
    )


def after_finetuning(frame: pd.DataFrame) -> str:
    """Where the split network ends, beside the full-rank one where every seed has it; "" where it is not fine-tuned."""
    change, gap = frame["delta"], frame["decomposed_top1"] - frame["baseline_top1"]
    if change.isna().any():
        return ""
    baseline = "" if gap.isna().any() else f", {off(gap.mean(), gap.std())} the full-rank network, fine-tuned alike"
    return f" Split and fine-tuned, the network ends {off(change.mean(), change.std())} its original{baseline}."


def interval(values: pd.Series) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"
