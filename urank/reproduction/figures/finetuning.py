"""What the fine-tuning decides: one network, split once, fine-tuned in several ways."""

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.selection import common, finetuning_epochs
from urank.reproduction.figures.style import styled
from urank.reproduction.figures.tables import measured_row, off, printed_row
from urank.reproduction.record import Record

FORMATS = {"learning rate": "{:g}", "split %": "{:.2f}", "full rank %": "{:.2f}"}
FORMATS |= dict.fromkeys(["split, change", "full rank, change"], "{:+.2f}")


def finetuning_table(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each recipe that one split network was fine-tuned by.

    Returns:
        `learning rate`, the highest; `split %` and `full rank %`, the accuracies of the split network and of the
        original one after the recipe (nan where the latter was not run), each with its change in points against the
        original network as it was trained.
    """
    epochs = pd.Index([finetuning_epochs(record) for record in records], name="epochs")
    return pd.DataFrame([finetuning_row(record) for record in records], index=epochs)


def finetuning_row(record: Record) -> dict:
    row = measured_row(record)
    return {
        "learning rate": record["experiment"]["finetune"]["lr"],
        "split %": row["decomposed_top1"],
        "split, change": row["delta"],
        "full rank %": row["baseline_top1"],
        "full rank, change": row["baseline_top1"] - row["original_top1"],
    }


def style_finetuning(frame: pd.DataFrame, identifier: str) -> Styler:
    """A table of this module as a page shows it."""
    return styled(frame, identifier, FORMATS)


def finetuning_caption(records: Sequence[Record]) -> str:
    """What the table says, in one paragraph of Markdown."""
    frame = finetuning_table(records)
    first, last = (
        f"{off(row['split, change'])} it after {epochs} epochs (learning rate {row['learning rate']:g})"
        for epochs, row in frame.iloc[[0, -1]].iterrows()
    )
    return (
        f"**{common(records)}.** The original reaches {records[0]['accuracy']['original']:.2f} %. Split at its "
        f"utilized ranks and fine-tuned, the network ends {first}, and {last}."
        f"{beside_full_rank(frame)}{beside_paper(records[0])}"
    )


def beside_full_rank(frame: pd.DataFrame) -> str:
    """How the gap to the network that was not split moves; "" where that was not fine-tuned alike."""
    gaps = (frame["split %"] - frame["full rank %"]).iloc[[0, -1]]
    if gaps.isna().any():
        return ""
    first, last = (f"{off(gap)} after {epochs}" for epochs, gap in gaps.items())
    return f" Against the full-rank network, fine-tuned alike, it ends {first} epochs and {last}; one run of each."


def beside_paper(record: Record) -> str:
    """The change that the paper prints for this network; "" where it prints none."""
    printed = printed_row(record)
    return "" if printed is None else f" The paper prints a change of {printed['delta_printed']:+.1f} points."
