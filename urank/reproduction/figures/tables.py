"""Tables 1, 3, 4 and 5: accuracy, mean layer utilization and size before and after, the paper's row above ours."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from urank.reproduction import paper
from urank.reproduction.experiment import Experiment
from urank.reproduction.figures.groups import origin_label, without_variants
from urank.reproduction.record import Record
from urank.training.recipe import result_fields

COLUMNS = {
    "original_top1": "original %",
    "baseline_top1": "full rank %",
    "original_mlu": "MLU of W %",
    "mlu": "MLU %",
    "projected_top1": "projected %",
    "decomposed_top1": "fine-tuned %",
    "delta": "change",
    "params_ratio": "params",
    "flops_ratio": "MACs",
    "speed_ratio": "speed",
}
OPTIONAL = ("full rank %", "projected %", "speed")  # columns shown only where a row has a value
SAME = ["dataset", "network"]  # the columns that a measured row shares with the paper's
# The paper's tables by number, and the columns that tell their rows apart.
PRINTED: dict[int, tuple[Callable[[], pd.DataFrame], list[str]]] = {
    1: (paper.table1, SAME),
    3: (paper.table3, SAME),
    4: (paper.table4, [*SAME, "variant"]),
    5: (paper.table5, [*SAME, "tolerance"]),
}


def printed_table(number: int) -> pd.DataFrame:
    """Return Table 1, 3, 4 or 5 as the paper prints it, with the paper's word FLOPs for MACs."""
    index = {3: SAME, 5: ["model", "tolerance"]}.get(number, ["model"])
    return with_labels(PRINTED[number][0]().set_index(index)).rename(columns={"MACs": "FLOPs"})


def measured_table(number: int, records: Iterable[Record]) -> pd.DataFrame:
    """Return the paper's row above ours for each network in `records`, in the paper's order.

    Accuracies and MLU are in percent; params and MACs are shares of the original network's. Of several seeds the row
    is the mean. "projected %" is the accuracy with every W' in place, before fine-tuning; "full rank %" is that of the
    original network after the same fine-tuning; "speed" is the throughput of the compact network over the original's
    at batch size 256. Variants are left out of Tables 1 and 3.

    Args:
        number: of the paper's table: 1, 3, 4 or 5.

    Raises:
        ValueError: two records share a row and differ in more than the seed.
    """
    read, same = PRINTED[number]
    printed, records = read(), without_variants(records) if same == SAME else records
    order = list(printed[same].itertuples(index=False, name=None))
    rows = []
    for key, seeds in sorted(by_row(records, same).items(), key=lambda row: (*order, row[0]).index(row[0])):
        rows += printed[(printed[same] == list(key)).all(axis=1)].assign(source="paper").to_dict("records")
        source = "measured" if len(seeds) == 1 else f"measured, mean of {len(seeds)}"
        rows.append(dict(zip(same, key)) | dict(source=source) | mean_row(seeds).to_dict())
    frame = with_labels(pd.DataFrame(rows, columns=[*same, "source", *COLUMNS]).set_index([*same, "source"]))
    return (
        frame.rename(index=origin_label, level="variant").rename_axis(index={"variant": "weights"})
        if number == 4
        else frame
    )


def with_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of `COLUMNS` under their labels, without optional ones that no row has."""
    frame = frame.reindex(columns=list(COLUMNS)).rename(columns=COLUMNS)
    return frame.drop(columns=[name for name in OPTIONAL if frame[name].isna().all()])


def mean_row(seeds: Sequence[Record]) -> pd.Series:
    """Return the mean of `measured_row` over seeds; nan where a seed has no value."""
    return pd.DataFrame([measured_row(record) for record in seeds]).mean(skipna=False)


def interval(seeds: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest of several seeds; nan for one seed.

    >>> interval([2.0, 1.0, 3.0])
    (1.0, 3.0)
    """
    return (float(np.min(seeds)), float(np.max(seeds))) if len(seeds) > 1 else (math.nan, math.nan)


def measured_row(record: Record) -> dict[str, float]:
    """Return the columns of the tables for one record, in the paper's units."""
    accuracy = record.accuracy
    finetuned = accuracy.finetuned if record.finetuned else float("nan")
    return dict(
        original_top1=accuracy.original,
        baseline_top1=float("nan") if accuracy.baseline is None else accuracy.baseline,
        original_mlu=100 * record.plan.weight_mlu,
        mlu=100 * record.plan.mlu,
        projected_top1=accuracy.projected,
        decomposed_top1=finetuned,
        delta=finetuned - accuracy.original,
        params_ratio=record.params_ratio,
        flops_ratio=record.macs_ratio,
        speed_ratio=next((ratio for (*_, batch), ratio in speed_ratios(record).items() if batch == 256), float("nan")),
    )


def speed_ratios(record: Record) -> dict[tuple[str, str, int], float]:
    """Return the compact network's throughput over the original's by device, precision and batch size."""
    speeds: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in record.throughput:
        speeds.setdefault((row.device, row.precision, row.batch), {})[row.network] = row.images_per_second
    return {where: timed["compact"] / timed["original"] for where, timed in speeds.items()}


def printed_row(record: Record) -> pd.Series | None:
    """Return the row of Table 3 for a record's network and data set; None if it has none or the width is not 1."""
    printed, experiment = paper.table3().set_index(SAME), record.experiment
    key = (experiment.dataset, experiment.network)
    return printed.loc[key] if key in printed.index and experiment.width == 1 else None


def by_row(records: Iterable[Record], same: Sequence[str]) -> dict[tuple, list[Record]]:
    """Return the records by the fields `same` of their experiments; one group is one row of a table.

    Raises:
        ValueError: two records of one group differ in more than the seed.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        seeds = groups.setdefault(tuple(getattr(record.experiment, name) for name in same), [])
        if seeds and unseeded(record.experiment) != unseeded(seeds[0].experiment):
            raise ValueError(
                f"{record.experiment.name} and {seeds[0].experiment.name} share a row of a table, but differ in more "
                "than the seed: publish the seeds of one profile"
            )
        seeds.append(record)
    return groups


def unseeded(experiment: Experiment) -> dict:
    """Return the settings that decide what is measured, without the seed."""
    recipes = {fit: result_fields(getattr(experiment, fit)) for fit in ("train", "finetune")}
    start = without_seed(experiment.start or "")
    return vars(experiment) | recipes | dict(seed=0, start=start, sweep=(), baseline=True)


def without_seed(name: str) -> str:
    """Return the experiment's name for seed 0.

    >>> without_seed("cifar10/vgg11-s2")
    'cifar10/vgg11'
    """
    return re.sub(r"-s\d+$", "", name)
