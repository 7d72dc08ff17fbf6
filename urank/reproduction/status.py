"""How far the reproduction is: one row per number of the paper's tables and figures, from the committed records.

A verdict depends on the size of the difference alone (`MARGINS`). A row that is not measured says what it needs.
"""

from statistics import mean, stdev

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper, profiles
from urank.reproduction.cost_estimates import needs
from urank.reproduction.figures.groups import (
    at_another_tolerance,
    from_other_weights,
    variant,
    with_variants,
    without_variants,
)
from urank.reproduction.figures.runs import devices
from urank.reproduction.figures.snapshot import peak_layers
from urank.reproduction.figures.style import WRAPPED, styled
from urank.reproduction.figures.tables import PRINTED, by_row, measured_row, unseeded, without_seed
from urank.reproduction.record import Record

# Largest distance from the paper's number: green up to the first margin, amber up to the second, red beyond.
MARGINS = {
    "original %": (0.5, 1.5),
    "change": (0.5, 1.5),
    "MLU of W %": (5, 10),
    "MLU %": (10, 20),
    "params": (0.10, 0.20),
    "MACs": (0.10, 0.20),
    "energy %": (10, 20),
    "peak layer": (0, 1),
}
QUANTITIES = {
    "original %": "original_top1",
    "change": "delta",
    "MLU of W %": "original_mlu",
    "MLU %": "mlu",
    "params": "params_ratio",
    "MACs": "flops_ratio",
}
COLORS = {
    "green": "background-color: #cdebd3; color: #12401f",
    "amber": "background-color: #fbe6b8; color: #573c00",
    "red": "background-color: #f6d0cb; color: #6b160c",
}
PAGES = {"Table 1": "table1_imagenet", "Table 3": "table3_cifar", "Table 4": "table4_pretraining"}
PAGES |= {"Table 5": "table5_tolerance", "Figure 1": "figure1_spectra", "Figure 2": "figure2_snapshots"}
COLUMNS = ["item", "quantity", "paper", "ours", "difference", "verdict", "spread", "runs", "date", "page"]
COLUMNS += ["device", "needs"]
# The words that name a row, beside the number of its table.
LABELS = {1: ["model"], 3: ["model", "dataset"], 4: ["model"], 5: ["model", "tolerance"]}
PEAK = (4, 6)  # the layers around which the rank of the paper's VGGs peaks (Figure 2, left)


def table(records: list[Record] | None = None) -> pd.DataFrame:
    """Return every number of the paper's tables and figures beside the measured one.

    Args:
        records: default all committed records.

    Returns:
        The columns of `COLUMNS`. `ours` is the mean over `runs` seeds and `spread` their standard deviation (nan for
        one run). `verdict` is "green", "amber", "red" or "not run"; `needs` says what a row that is not run takes.
    """
    records = profiles.recorded() if records is None else records
    rows = figure1_rows(records) + figure2_rows(records)
    for number in PRINTED:
        rows += table_rows(number, [one for one in records if one.experiment.width == 1])
    return pd.DataFrame(rows, columns=COLUMNS)


def table_rows(number: int, records: list[Record]) -> list[dict]:
    """Return the rows of Table 1, 3, 4 or 5; records of full width."""
    read, same = PRINTED[number]
    measured, rows = by_row(shown_in(number, records), same), []
    for printed in read().to_dict("records"):
        words = [str(printed[name]) for name in LABELS[number]]
        seeds = measured.get(tuple(printed[name] for name in same), [])
        rows += quantity_rows(f"Table {number}: {', '.join(words)}", printed, seeds, f"Table {number}")
    return rows


def shown_in(number: int, records: list[Record]) -> list[Record]:
    """Return the records that measure a table: networks from other weights, at other tolerances, or no variants."""
    if number == 4:
        return with_variants(records, from_other_weights)
    return with_variants(records, at_another_tolerance) if number == 5 else without_variants(records)


def quantity_rows(item: str, printed: dict, seeds: list[Record], where: str) -> list[dict]:
    """Return one row per quantity of a printed row, or one that says what is needed if it is not measured."""
    if not seeds:
        return [missing(item, where, row_needs(printed))]
    # The paper prints DeiT's changes against the fine-tuned original.
    printed = printed | dict(delta=round(printed["decomposed_top1"] - printed["original_top1"], 1))
    measured, rows = pd.DataFrame([measured_row(record) for record in seeds]), []
    for quantity, column in QUANTITIES.items():
        if measured[column].isna().any():
            rows.append(missing(f"{item}, {quantity}", where, f"fine-tuning: {row_needs(printed)}"))
        elif pd.notna(printed[column]):
            rows.append(measured_quantity(item, quantity, printed[column], measured[column].tolist(), seeds, where))
    return rows


def row_needs(printed: dict) -> str:
    network, dataset = printed["network"], printed["dataset"]
    return needs(network, dataset, paper.side(printed["model"], dataset))


def measured_quantity(
    item: str, quantity: str, printed: float, ours: list[float], seeds: list[Record], where: str
) -> dict:
    """Return the row of one measured number, the mean over seeds, beside the paper's."""
    return dict(
        item=item,
        quantity=quantity,
        paper=printed,
        ours=mean(ours),
        spread=stdev(ours) if len(ours) > 1 else float("nan"),
        runs=len(ours),
        difference=mean(ours) - printed,
        verdict=verdict(quantity, mean(ours) - printed),
        device=devices(seeds),
        date=max(record.date for record in seeds),
        page=PAGES[where],
        needs="",
    )


def verdict(quantity: str, difference: float) -> str:
    """Return the colour of a difference by the margins of its quantity."""
    green, amber = MARGINS[quantity]
    size = abs(difference) - 1e-9  # 0.1 + 0.2 is within 0.3
    return "green" if size <= green else "amber" if size <= amber else "red"


def missing(item: str, where: str, needed: str) -> dict:
    return dict(item=item, quantity="", runs=0, verdict="not run", page=PAGES[where], needs=needed)


def figure1_rows(records: list[Record]) -> list[dict]:
    """Return Figure 1(b): the smallest share of input energy that keeps the accuracy, of the less demanding layer."""
    item = "Figure 1(b): energy that suffices, VGG11 on CIFAR10, the less demanding layer"
    swept = [record for record in records if is_base(record, "cifar10", "vgg11") and record.sweep]
    if not swept:
        return [missing(item, "Figure 1", "a record of cifar10/vgg11 with a `sweep`")]
    energies = [smallest_sufficient_energy(record) for record in swept]
    return [measured_quantity(item, "energy %", paper.ENOUGH, energies, swept, "Figure 1")]


def smallest_sufficient_energy(record: Record) -> float:
    """Return the lowest threshold tried, in percent, that costs one layer at most the tolerance; 100 if none does."""
    return min((100 * row.energy for row in record.sweep if row.correct >= record.plan.least_correct), default=100.0)


def figure2_rows(records: list[Record]) -> list[dict]:
    """Return Figure 2, left: the layer at which the utilized rank of a VGG is largest."""
    rows = []
    for network in ("vgg11", "vgg19"):
        item = f"Figure 2: rank peak of {network.upper()} on CIFAR10"
        found = [record for record in records if is_base(record, "cifar10", network)]
        if not found:
            rows.append(missing(item, "Figure 2", f"a record of cifar10/{network}"))
            continue
        peaks = [float(peak_layers(record)[0]) for record in found]
        nearest = min(max(mean(peaks), PEAK[0]), PEAK[1])
        row = measured_quantity(item, "peak layer", nearest, peaks, found, "Figure 2")
        rows.append(row | dict(paper=f"{PEAK[0]} to {PEAK[1]}"))
    return rows


def is_base(record: Record, dataset: str, network: str) -> bool:
    """Whether the record is of this network on this data set, at full width and without a variant."""
    chosen = record.experiment
    return (chosen.dataset, chosen.network, chosen.width, variant(record)) == (dataset, network, 1, "")


def style(frame: pd.DataFrame) -> Styler:
    """Return the measured rows of `table` as a page shows them."""
    shown = frame[frame["verdict"] != "not run"].copy()
    shown["item"] = [f'<a href="{page}.html">{item}</a>' for item, page in zip(shown["item"], shown["page"])]
    shown = shown.drop(columns=["page", "needs"]).set_index(["item", "quantity"])
    formats = {"paper": as_printed, "ours": "{:.4g}", "spread": "{:.2g}", "difference": "{:+.3g}"}
    table = styled(shown, "status", formats).map(lambda cell: COLORS.get(cell, ""), subset=["verdict"])
    return table.set_properties(subset=["device"], **WRAPPED | {"min-width": "12em"})


def as_printed(value: float | str) -> str:
    """Return a printed number, or the range that the text gives."""
    return value if isinstance(value, str) else f"{value:.4g}"


def style_missing(frame: pd.DataFrame) -> Styler:
    """Return what is not run, and what it needs."""
    shown = frame[frame["verdict"] == "not run"].set_index("item")[["needs"]]
    return styled(shown, "status-missing", text=True)


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, by quantity, how many numbers are measured, in how many rows, and their verdicts.

    `opposite sign` counts the changes of accuracy whose sign is opposite to the paper's.
    """
    measured = frame[frame["verdict"] != "not run"]
    named = pd.concat([measured, measured.assign(quantity="all")])
    changes = measured[measured["quantity"] == "change"]
    table = pd.crosstab(named["quantity"], named["verdict"]).reindex([*MARGINS, "all"], columns=[*COLORS], fill_value=0)
    table.insert(0, "numbers", table.sum(axis="columns"))
    return table.assign(
        **{
            "opposite sign": pd.Series({"change": (changes["paper"] * changes["ours"] < 0).sum()}),
            "rows": named.groupby("quantity")["item"].nunique(),
            "rows not run": pd.Series({"all": len(frame) - len(measured)}),
        }
    )


def summary(frame: pd.DataFrame) -> str:
    """Return how many numbers are measured and how many agree, in one line."""
    found = frame["verdict"].value_counts()
    colors = ", ".join(f"{found.get(color, 0)} {color}" for color in COLORS)
    return f"{(frame['verdict'] != 'not run').sum()} numbers measured: {colors}; {found.get('not run', 0)} rows not run"


def margins() -> pd.DataFrame:
    """Return the margins of the verdicts, as the largest difference of each colour."""
    return pd.DataFrame(MARGINS, index=["green up to", "amber up to"]).T.rename_axis("difference in")


def outdated(name: str, committed: list[Record]) -> list[str]:
    """Return a sentence for each committed record that can no longer be shown beside the one called `name`."""
    records = {record.experiment.name: record for record in committed}
    published = records.pop(name)
    advice = "publish it from the same profile, or delete data/records/{}.json"
    other_settings = [
        f"{other} has other settings than {name}, so no table can average them: {advice.format(other)}"
        for other, record in records.items()
        if without_seed(other) == without_seed(name) and unseeded(record.experiment) != unseeded(published.experiment)
    ]
    return other_settings + [
        f"{other} has other weights than {name} has now, so they are no longer compared: {advice.format(other)}"
        for other, record in records.items()
        if searched_again(record, name) and record.weights != published.weights
    ]


def searched_again(record: Record, name: str) -> bool:
    """Whether the record is of the network that the experiment called `name` trained, searched again."""
    return record.experiment.start == name and record.experiment.train.epochs == 0
