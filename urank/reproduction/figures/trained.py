"""What the training decides: one network, trained in several ways and measured alike."""

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.finetuning import beside_paper
from urank.reproduction.figures.repetition import EXACT
from urank.reproduction.figures.selection import common, finetuning_epochs, training_epochs
from urank.reproduction.figures.style import styled
from urank.reproduction.figures.tables import measured_row, off, with_labels
from urank.reproduction.record import Record

RATE = "learning rate"


def training_table(records: Sequence[Record]) -> pd.DataFrame:
    """The columns of Table 3 and the highest learning rate, a row for each way of training.

    Returns:
        Indexed by the epochs of training and of fine-tuning.
    """
    epochs = [(training_epochs(record), finetuning_epochs(record)) for record in records]
    index = pd.MultiIndex.from_tuples(epochs, names=["epochs of training", "of fine-tuning"])
    frame = with_labels(pd.DataFrame([measured_row(record) for record in records], index))
    frame.insert(0, RATE, [record["experiment"]["train"]["lr"] for record in records])
    return frame


def style_training(frame: pd.DataFrame, identifier: str) -> Styler:
    """The table as a page shows it."""
    return styled(frame, identifier, EXACT | {RATE: "{:g}"})


def training_caption(records: Sequence[Record]) -> str:
    """What the table says of the shortest and of the longest training, in one paragraph of Markdown."""
    first, last = (trained(record) for record in (records[0], records[-1]))
    return f"**{common(records)}.** {first} {last}{beside_paper(records[0])}"


def trained(record: Record) -> str:
    row = measured_row(record)
    epochs, change = finetuning_epochs(record), row["delta"]
    end = f"; split, and fine-tuned for {epochs} epochs, the network ends {off(change)} its original"
    return (
        f"After {training_epochs(record)} epochs the original reaches {row['original_top1']:.2f} %, the MLU of its "
        f"trained weights is {row['original_mlu']:.1f} %, and the search finds one of {row['mlu']:.1f} %"
        f"{end if record.finetuned else ''}."
    )
