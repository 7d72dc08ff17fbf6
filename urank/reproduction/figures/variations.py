"""What one choice changes: tables of records that differ in one thing, and of what splitting does to each network."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import mean

import pandas as pd

from urank.reproduction.figures.groups import (
    finetuning_epochs,
    place,
    search_label,
    seed,
    training_epochs,
    without_variants,
)
from urank.reproduction.figures.tables import (
    COLUMNS,
    SAME,
    by_row,
    measured_row,
    printed_row,
    speed_ratios,
    with_labels,
)
from urank.reproduction.record import Record


def seed_table(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per seed, then their mean and the paper's row."""
    frame = rows(records, [seed(record) for record in records])
    mean = frame.mean(skipna=False).to_frame("mean").T
    return with_paper(pd.concat([frame, mean]), records[0]).rename_axis("seed")


def recipe_table(records: Sequence[Record], fit: str) -> pd.DataFrame:
    """Return one row per recipe, by its epochs, then the paper's row.

    Args:
        fit: "train" or "finetune": the fit whose recipes differ.
    """
    recipes = [getattr(record.experiment, fit) for record in records]
    frame = rows(records, [recipe.epochs for recipe in recipes])
    frame.insert(0, "learning rate", [recipe.lr for recipe in recipes])
    return with_paper(frame, records[0]).rename_axis(
        "epochs of training" if fit == "train" else "epochs of fine-tuning"
    )


def rows(records: Iterable[Record], names: Sequence[object]) -> pd.DataFrame:
    """Return the columns of Table 3 for each record, and how the full-rank network does after the same fine-tuning."""
    frame = with_labels(pd.DataFrame([measured_row(record) for record in records], index=names))
    if "full rank %" in frame:
        frame["full rank, change"] = frame["full rank %"] - frame["original %"]
        frame["fine-tuned − full rank"] = frame["fine-tuned %"] - frame["full rank %"]
    return frame


def with_paper(frame: pd.DataFrame, record: Record) -> pd.DataFrame:
    """Return the frame with the paper's row for the record's network, if it has one, at the end."""
    printed = printed_row(record)
    if printed is None:
        return frame
    return pd.concat([frame, printed.rename(COLUMNS).reindex(frame.columns).rename("paper").to_frame().T.astype(float)])


def search_table(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per way to search a network; the first record is the reference. The paper's row is the last.

    Returns:
        `moved by at most`: the largest change of a layer's utilization against the first record, in points.
        `may lose`: 2 L tolerance, the bound on the loss of a joint search over L layers, in points.
        `lost, consulted` and `lost, test`: the accuracy points that all projections together cost on the images that
        the search used and on the test images. Isolated searches have neither a bound nor the former.
    """
    names = [search_label(record, records) for record in records]
    frame = pd.DataFrame([search_row(record, records[0]) for record in records], index=names)
    if any(record.experiment.holdout for record in records):  # the paper's network was trained on all images
        return frame.rename_axis("search")
    return with_paper(frame, records[0]).rename_axis("search")


def search_row(record: Record, reference: Record) -> dict[str, float]:
    pairs = zip(record.plan.layers, reference.plan.layers, strict=True)
    joint = record.plan.mode != "isolated"
    return {
        "original %": record.accuracy.original,
        "MLU %": 100 * record.plan.mlu,
        "moved by at most": 100 * max(abs(one.utilization - other.utilization) for one, other in pairs),
        "params": record.params_ratio,
        "may lose": 2 * len(record.plan.layers) * record.plan.tolerance if joint else float("nan"),
        "lost, consulted": lost_where_consulted(record) if joint else float("nan"),
        "lost, test": record.accuracy.original - record.accuracy.projected,
    }


def lost_where_consulted(record: Record) -> float:
    """Return the accuracy points that all projections of a joint search cost on the images that it used."""
    last = record.plan.layers[0 if record.experiment.order == "backward" else -1]
    return 100 * (record.plan.correct - last.correct) / record.plan.total


def size_table(records: Sequence[Record]) -> pd.DataFrame:
    """Return what splitting does to each network: layers, parameters and MACs per image, accuracy at each step.

    Of several seeds a number is the mean.

    Returns:
        `split %`: with every layer split, before fine-tuning; `epochs`: of training + of fine-tuning;
        `original − paper`: in accuracy points, nan where the paper does not have the network.
    """
    groups = by_row(records, SAME)
    index = pd.MultiIndex.from_tuples(groups, names=SAME)
    frames = [pd.DataFrame([size_row(record) for record in seeds]) for seeds in groups.values()]
    means = [frame.mean(numeric_only=True, skipna=False) for frame in frames]
    return pd.DataFrame(means, index=index).assign(epochs=[frame["epochs"].iloc[0] for frame in frames])


def size_row(record: Record) -> dict[str, float | str]:
    cost, row, printed = record.cost, measured_row(record), printed_row(record)
    return {
        "layers": len(record.plan.layers),
        "smaller as two": sum(entry.useful for entry in record.plan.layers),
        "params of original, M": cost.original.params / 1e6,
        "params, M": cost.compact.params / 1e6,
        "MACs of original, M": cost.original.macs / 1e6,
        "MACs, M": cost.compact.macs / 1e6,
        "original %": row["original_top1"],
        "split %": record.accuracy.decomposed,
        "fine-tuned %": row["decomposed_top1"],
        "full rank %": row["baseline_top1"],
        "fine-tuned − full rank": row["decomposed_top1"] - row["baseline_top1"],
        "epochs": f"{training_epochs(record)} + {finetuning_epochs(record)}",
        "original − paper": float("nan") if printed is None else row["original_top1"] - printed["original_top1"],
    }


def speed_table(records: Iterable[Record]) -> pd.DataFrame:
    """Return the compact network's throughput over the original's, a column per precision and batch size.

    Of several seeds a number is the mean; variants are left out.
    """
    ratios: dict[tuple, list[float]] = {}
    for record in without_variants(records):
        for where, ratio in speed_ratios(record).items():
            ratios.setdefault((*place(record), *where), []).append(ratio)
    index = pd.MultiIndex.from_tuples(ratios, names=[*SAME, "device", "precision", "batch"])
    means = pd.Series([mean(several) for several in ratios.values()], index, dtype=float)
    frame = means.unstack(["precision", "batch"], sort=False).sort_index(axis="columns", ascending=[False, True])
    return frame.set_axis([f"{precision}, batch {batch}" for precision, batch in frame.columns], axis="columns")


def throughput_table(records: Iterable[Record]) -> pd.DataFrame:
    """Return the images per second of the original and of the compact network, one row per record and timing."""
    timings = [dict(record=record.experiment.name) | asdict(row) for record in records for row in record.throughput]
    index = ["record", "device", "precision", "batch"]
    columns = [*index, "network", "images_per_second"]
    frame = pd.DataFrame(timings, columns=columns).pivot(index=index, columns="network", values="images_per_second")
    return frame[["original", "compact"]].add_suffix(", images/s").rename_axis(columns=None)


def faster_counts(speeds: pd.DataFrame) -> pd.DataFrame:
    """Return in how many rows of `speed_table` the compact network is the faster one, and how many were timed."""
    return pd.DataFrame({"compact is faster": (speeds > 1).sum(), "timed": speeds.notna().sum()}).T
