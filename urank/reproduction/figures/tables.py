"""Tables 1, 3, 4 and 5: accuracy, mean layer utilization and size before and after, the paper's row above ours."""

import re
from collections.abc import Iterable, Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper
from urank.reproduction.figures.selection import training, variant, without_variants
from urank.reproduction.figures.style import WRAPPED, signed, styled
from urank.reproduction.record import Record
from urank.training.recipe import what_is_fitted

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
OPTIONAL = ["baseline_top1", "projected_top1", "speed_ratio"]  # shown where a row has them
SAME = ["dataset", "network"]  # what a measured row and the paper's have in common
# One decimal for percents, two for shares, a sign on the change.
FORMATS = {label: "{:.1f}" for label in COLUMNS.values()} | {"change": signed}
FORMATS |= dict.fromkeys(["params", "MACs", "FLOPs", "speed"], "{:.2f}")


def table1(records: Iterable[Record]) -> pd.DataFrame:
    """Table 1: networks on ImageNet, variants left out; see `comparison`."""
    return comparison(without_variants(records), printed_table1())


def printed_table1() -> pd.DataFrame:
    """The paper's rows with the fine-tuned full-rank accuracies under the name that measured ones have."""
    return paper.table1().rename(columns={"original_top1_finetuned": "baseline_top1"})


def table3(records: Iterable[Record]) -> pd.DataFrame:
    """Table 3: VGG and ResNet on CIFAR, variants left out; see `comparison`."""
    return comparison(without_variants(records), paper.table3())


def table4(records: Iterable[Record]) -> pd.DataFrame:
    """Table 4: one network from scratch, after a linear probe, after fine-tuning end to end; see `comparison`."""
    frame = comparison(records, paper.table4(), [*SAME, "variant"])
    return frame.rename(index=training, level="variant").rename_axis(index={"variant": "weights"})


def table5(records: Iterable[Record]) -> pd.DataFrame:
    """Table 5: one network at several tolerances, in accuracy points; see `comparison`."""
    return comparison(records, paper.table5(), [*SAME, "tolerance"])


def comparison(records: Iterable[Record], printed: pd.DataFrame, same: Sequence[str] = SAME) -> pd.DataFrame:
    """The paper's row above ours, for every network and data set that the records hold, in the paper's order.

    Accuracies and MLU in percent, params and MACs as shares of the original's; the mean over seeds where the records
    hold several. "projected %" is the accuracy with every W' in place and nothing fine-tuned, "full rank %" that of the
    original network fine-tuned as long as the split one, "speed" the images that the compact network classifies in a
    second over those of the original, in batches of 256; these columns are there where a row has them.

    Args:
        printed: one of `paper`'s tables.
        same: the columns whose values a measured row shares with the paper's.
    """
    printed = printed.rename(columns={"delta_printed": "delta"})
    place = {key: number for number, key in enumerate(printed[list(same)].itertuples(index=False, name=None))}
    rows = []
    for key, seeds in sorted(grouped(records, same).items(), key=lambda group: place.get(group[0], len(place))):
        agrees = (printed[list(same)] == list(key)).all(axis=1)
        rows += printed[agrees].assign(source="paper").to_dict("records")
        source = "measured" if len(seeds) == 1 else f"measured, mean of {len(seeds)}"
        means = pd.DataFrame([measured_row(record) for record in seeds]).mean(skipna=False).to_dict()
        rows.append(dict(zip(same, key)) | dict(source=source) | means)
    frame = pd.DataFrame(rows, columns=[*same, "source", *COLUMNS]).set_index([*same, "source"])
    return with_labels(frame)


def with_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of `COLUMNS` under the names a page shows; of the optional ones those that some row has."""
    frame = frame.reindex(columns=list(COLUMNS))
    empty = [name for name in OPTIONAL if frame[name].isna().all()]
    return frame.drop(columns=empty).rename(columns=COLUMNS)


def grouped(records: Iterable[Record], same: Sequence[str]) -> dict[tuple, list[Record]]:
    """Records by the values of `same`: those of one group differ in the seed alone.

    Raises:
        ValueError: two records of one group were run otherwise: their mean would say nothing.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        experiment = record["experiment"] | dict(variant=variant(record))
        seeds = groups.setdefault(tuple(experiment[name] for name in same), [])
        if seeds and but_for_seed(record) != but_for_seed(seeds[0]):
            raise ValueError(
                f"{record.experiment.name} and {seeds[0].experiment.name} share a row of a table, but differ in more "
                "than the seed: publish the seeds of one profile"
            )
        seeds.append(record)
    return groups


def but_for_seed(record: Record) -> dict:
    """What a record's experiment measures, without its seed and that of the one it starts from."""
    experiment = record["experiment"]
    recipes = {fit: what_is_fitted(experiment[fit]) for fit in ("train", "finetune")}
    return experiment | recipes | dict(seed=0, start=unseeded(experiment["start"] or ""), sweep=(), baseline=True)


def unseeded(name: str) -> str:
    """The name of the experiment from seed 0."""
    return re.sub(r"-s\d+$", "", name)


def measured_row(record: Record) -> dict:
    """The columns of the tables for one record, in the units of the paper."""
    accuracy = record["accuracy"]
    finetuned = accuracy["finetuned"] if record.finetuned else float("nan")
    return dict(
        original_top1=accuracy["original"],
        baseline_top1=baseline(record),
        original_mlu=100 * record.plan.weight_mlu,
        mlu=100 * record.plan.mlu,
        projected_top1=accuracy["projected"],
        decomposed_top1=finetuned,
        delta=finetuned - accuracy["original"],
        params_ratio=record.params_ratio,
        flops_ratio=record.macs_ratio,
        speed_ratio=speed_ratio(record),
    )


def printed_row(record: Record) -> pd.Series | None:
    """The row of Table 3 for the network and data set of a record; None where it has none, or the width is not 1."""
    experiment, printed = record["experiment"], paper.table3().set_index(SAME)
    key = tuple(experiment[name] for name in SAME)
    return printed.loc[key] if key in printed.index and experiment["width"] == 1 else None


def baseline(record: Record) -> float:
    """Accuracy of the full-rank network after the same fine-tuning; nan where that was not run."""
    measured = record["accuracy"]["baseline"]
    return float("nan") if measured is None else measured


def off(change: float, deviation: float | None = None) -> str:
    """A signed distance in points, in words; with its standard deviation where it is a mean."""
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{abs(change):.2f}{spread} points {'below' if change < 0 else 'above'}"


def speed_ratio(record: Record) -> float:
    """Images a second of the compact network over those of the original, at 256 a batch, as it was timed first.

    nan where it was not.
    """
    return next((ratio for (_, _, batch), ratio in speed_ratios(record).items() if batch == 256), float("nan"))


def speed_ratios(record: Record) -> dict[tuple[str, str, int], float]:
    """Images a second of the compact network over those of the original by device, precision and images a batch."""
    speeds: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in record["latency"]:
        timed = speeds.setdefault((row["device"], row["precision"], row["batch"]), {})
        timed[row["network"]] = row["images_per_second"]
    return {where: timed["compact"] / timed["original"] for where, timed in speeds.items()}


def style_table(frame: pd.DataFrame, identifier: str) -> Styler:
    """A table of this module as a page shows it."""
    table = styled(frame, identifier, FORMATS)
    return table.format_index("{:g}", level="tolerance") if "tolerance" in frame.index.names else table


def paper_table1() -> Styler:
    """All rows of Table 1 as the paper prints them, styled."""
    return printed_table(printed_table1(), ["model"], "table1-printed")


def paper_table3() -> Styler:
    """All rows of Table 3 as the paper prints them, styled."""
    return printed_table(paper.table3(), SAME, "table3-printed")


def paper_table4() -> Styler:
    """All rows of Table 4 as the paper prints them, styled."""
    return printed_table(paper.table4(), ["model"], "table4-printed")


def paper_table5() -> Styler:
    """Table 5 as the paper prints it, the original network's numbers and the change beside each row."""
    return printed_table(paper.table5(), ["model", "tolerance"], "table5-printed")


def printed_table(printed: pd.DataFrame, index: list[str], identifier: str) -> Styler:
    frame = with_labels(printed.rename(columns={"delta_printed": "delta"}).set_index(index))
    return style_table(frame.rename(columns={"MACs": "FLOPs"}), identifier)  # the paper's word


def plan_table(record: Record) -> Styler:
    """Layer by layer: W is d x m; what the search kept; the ranks."""
    frame = record.plan.to_frame()
    return styled(frame, identifier("plan", record), {"utilization": "{:.3f}"}).hide(axis="index")


def probes_table(record: Record, layer: str) -> Styler:
    """What one layer cost the search, probe by probe; a blank count is a probe that was ended early."""
    probes = record.plan.probes_frame()
    table = styled(probes[probes["layer"] == layer], identifier("probes", record))
    return table.format(na_rep="").hide(axis="index")


def identifier(kind: str, record: Record) -> str:
    """A name for a table's HTML that is the same in each run and unlike that of another record."""
    experiment = record["experiment"]
    parts = (kind, experiment["dataset"], experiment["network"], variant(record), f"s{experiment['seed']}")
    return "-".join(part for part in parts if part).replace("/", "-").replace(".", "-")


def provenance(record: Record) -> Styler:
    """From which run the numbers come: network, data, seed, device, date, versions, seconds a stage."""
    experiment = record["experiment"]
    recipe = {name: experiment[name]["epochs"] for name in ("train", "finetune")}
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    seconds = ", ".join(f"{stage} {time:.0f}" for stage, time in record["seconds"].items())
    start = experiment["start"] or experiment["pretrained"]
    start = {"started from": start} if start else {}
    rows = {
        "network": f"{experiment['network']}, width {experiment['width']:g}",
        "data set": experiment["dataset"],
        **start,
        "epochs": f"{recipe['train']} of training, {recipe['finetune']} of fine-tuning",
        "search": f"tolerance {experiment['tolerance']:g} points, {experiment['mode']}, "
        f"on {record.plan.total} {record['consulted']} images",
        "calibration": f"{record['calibration_images']} training images",
        "seed": experiment["seed"],
        "device": devices([record]),
        "fitted in": precisions(record),
        "date": record["made"]["finetune"]["date"],
        "versions": versions,
        "seconds": seconds,
    }
    frame = pd.DataFrame({"": rows})
    return styled(frame, identifier("run", record), text=True).hide(axis="columns")


def devices(records: Iterable[Record]) -> str:
    """Every device that a stage of the records was computed on."""
    names = {name for record in records for made in record["made"].values() for name in made["device"].split("; ")}
    return "; ".join(sorted(names))


def precisions(record: Record) -> str:
    """In which arithmetic the epochs were computed; those from before this was noted do not say."""
    noted = {epoch.get("precision", "not noted") for epochs in record["history"].values() for epoch in epochs}
    return ", ".join(sorted(noted)) or "–"


def provenances(records: Sequence[Record]) -> Styler:
    """One line a run, for pages that show several; at least one."""
    rows = {}
    for record in records:
        experiment = record["experiment"]
        rows[record.experiment.name] = {
            "width": f"{experiment['width']:g}",
            "epochs": f"{experiment['train']['epochs']} + {experiment['finetune']['epochs']}",
            "tolerance": f"{experiment['tolerance']:g}",
            "calibration images": record["calibration_images"],
            "search images": record.plan.total,
            "seed": experiment["seed"],
            "minutes": f"{sum(record['seconds'].values()) / 60:.1f}",
            "device": devices([record]),
            "date": record["made"]["finetune"]["date"],
        }
    table = styled(pd.DataFrame(rows).T.rename_axis("run"), identifier("runs", records[-1]))
    return table.set_properties(subset=["device"], **WRAPPED)
