"""What the training decides: one network, trained in several ways and measured alike."""

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.figures.contrasts import common, finetuning_epochs, training_epochs
from urank.figures.finetuning import beside_paper
from urank.figures.repetition import EXACT
from urank.figures.style import styled
from urank.figures.tables import measured_row, off, with_labels
from urank.records import Record


def training_table(records: Sequence[Record]) -> pd.DataFrame:
    """The columns of Table 3, a row for each way of training: epochs of training, of fine-tuning."""
    epochs = [(training_epochs(record), finetuning_epochs(record)) for record in records]
    rows = pd.DataFrame([measured_row(record) for record in records], index=pd.MultiIndex.from_tuples(epochs))
    return with_labels(rows).rename_axis(["epochs of training", "of fine-tuning"])


def style_training(frame: pd.DataFrame, identifier: str) -> Styler:
    """The table as a page shows it."""
    return styled(frame, identifier, EXACT)


def training_caption(records: Sequence[Record]) -> str:
    """What the table says of the shortest and of the longest training, in one paragraph of Markdown."""
    first, last = (trained(record) for record in (records[0], records[-1]))
    return f"**{common(records)}.** {first} {last}{beside_paper(records[0])}"


def trained(record: Record) -> str:
    row = measured_row(record)
    return (
        f"After {training_epochs(record)} epochs the original reaches {row['original_top1']:.2f} %, the MLU of its "
        f"trained weights is {row['original_mlu']:.1f} %, and the search finds one of {row['mlu']:.1f} %; split, and "
        f"fine-tuned for {finetuning_epochs(record)} epochs, the network ends {off(row['delta'])} its original."
    )
