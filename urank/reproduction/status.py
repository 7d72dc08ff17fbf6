"""How far the reproduction is: a row for every number of the paper's figures and tables, from the committed records.

A difference within the first of two margins is green, within the second amber, beyond it red. What has not been
measured says what it would need.
"""

from dataclasses import dataclass
from math import sqrt

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper, profiles
from urank.reproduction.cost_estimates import needs
from urank.reproduction.figures.selection import (
    at_another_tolerance,
    beside_plain,
    from_other_weights,
    variant,
    without_variants,
)
from urank.reproduction.figures.snapshot import peak_layers
from urank.reproduction.figures.style import WRAPPED, styled
from urank.reproduction.figures.tables import SAME, but_for_seed, devices, grouped, measured_row, unseeded
from urank.reproduction.record import Record

# How far a measured number may be from the paper's: green up to the first, amber up to the second, red beyond.
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
COLUMNS = [
    "item",
    "quantity",
    "paper",
    "ours",
    "difference",
    "verdict",
    "spread",
    "runs",
    "date",
    "page",
    "device",
    "needs",
]
PEAK = (4, 6)  # layers between which the paper sees the rank of its VGGs peak (Figure 2, left)


@dataclass(frozen=True)
class Row:
    """One row of one of the paper's tables, by this project's names."""

    table: str
    model: str
    same: dict
    printed: dict

    @property
    def item(self) -> str:
        return f"{self.table}: {self.model}"

    @property
    def place(self) -> dict:
        """Which network sees which images, of how many pixels a side."""
        network, dataset = self.same["network"], self.same["dataset"]
        return dict(network=network, dataset=dataset, side=paper.side(self.printed["model"], dataset))


def table(records: list[Record] | None = None) -> pd.DataFrame:
    """Every number of the paper's figures and tables beside the measured one.

    Args:
        records: default all that are committed.

    Returns:
        The columns of `COLUMNS`: `ours` is the mean over `runs` seeds and `spread` their standard deviation (nan for
        one); `verdict` is "green", "amber", "red" or "not run", and then `needs` says what a run would take.
    """
    records = profiles.recorded() if records is None else records
    rows = figure1_rows(records) + figure2_rows(records)
    for row in paper_rows():
        rows += compared(row, records)
    return pd.DataFrame(rows, columns=COLUMNS)


def paper_rows() -> list[Row]:
    """The rows of Tables 1, 3, 4 and 5."""
    sources = [
        ("Table 1", paper.table1(), SAME, ["model"]),
        ("Table 3", paper.table3(), SAME, ["model", "dataset"]),
        ("Table 4", paper.table4(), [*SAME, "variant"], ["model"]),
        ("Table 5", paper.table5(), [*SAME, "tolerance"], ["model", "tolerance"]),
    ]
    rows = []
    for name, printed, same, label in sources:
        change = (printed["decomposed_top1"] - printed["original_top1"]).round(1)  # DeiT's are printed otherwise
        for row in printed.assign(delta=change).to_dict("records"):
            title = ", ".join(str(row[column]) for column in label)
            rows.append(Row(name, title, {column: row[column] for column in same}, row))
    return rows


def compared(row: Row, records: list[Record]) -> list[dict]:
    """A line for each quantity of one row; one line that says what is needed where it has not been measured."""
    full = [one for one in records if one["experiment"]["width"] == 1]
    seeds = grouped(in_table(row, full), list(row.same)).get(tuple(row.same.values()), [])
    if not seeds:
        return [missing(row.item, PAGES[row.table], needs(**row.place, records=full))]
    measured = pd.DataFrame([measured_row(record) for record in seeds])
    printed = {quantity: column for quantity, column in QUANTITIES.items() if pd.notna(row.printed[column])}
    return [
        line(row.item, quantity, row.printed[column], measured[column].tolist(), seeds, PAGES[row.table])
        if measured[column].notna().all()
        else missing(f"{row.item}, {quantity}", PAGES[row.table], f"fine-tuning: {needs(**row.place, records=full)}")
        for quantity, column in printed.items()
    ]


def in_table(row: Row, records: list[Record]) -> list[Record]:
    """The records that a table's rows are measured by: of other weights, at other tolerances, or no variants."""
    if "variant" in row.same:
        return beside_plain(records, from_other_weights)
    if "tolerance" in row.same:
        return beside_plain(records, at_another_tolerance)
    return without_variants(records)


def line(item: str, quantity: str, printed: float, ours: list[float], seeds: list[Record], page: str) -> dict:
    """One measured number beside the paper's."""
    mean = sum(ours) / len(ours)
    spread = sqrt(sum((value - mean) ** 2 for value in ours) / (len(ours) - 1)) if len(ours) > 1 else float("nan")
    return dict(
        item=item,
        quantity=quantity,
        paper=printed,
        ours=mean,
        spread=spread,
        runs=len(ours),
        difference=mean - printed,
        verdict=verdict(quantity, mean - printed),
        device=devices(seeds),
        date=max(record["made"]["finetune"]["date"] for record in seeds),
        page=page,
        needs="",
    )


def verdict(quantity: str, difference: float) -> str:
    """The colour of a difference, by the margins of its quantity."""
    green, amber = MARGINS[quantity]
    size = abs(difference) - 1e-9  # 0.1 + 0.2 is within 0.3
    return "green" if size <= green else "amber" if size <= amber else "red"


def missing(item: str, page: str, needed: str) -> dict:
    return dict(item=item, quantity="", runs=0, verdict="not run", page=page, needs=needed)


def figure1_rows(records: list[Record]) -> list[dict]:
    """Figure 1(b): the least share of input energy that keeps the accuracy, for the least demanding layer swept."""
    item = "Figure 1(b): energy that suffices, VGG11 on CIFAR10, the less demanding layer"
    swept = [record for record in records if is_plain(record, "cifar10", "vgg11") and record["sweep"]]
    if not swept:
        return [missing(item, PAGES["Figure 1"], "a record of cifar10/vgg11 with a `sweep`")]
    return [line(item, "energy %", paper.ENOUGH, [enough(record) for record in swept], swept, PAGES["Figure 1"])]


def enough(record: Record) -> float:
    """The lowest energy threshold tried, in percent, that costs one layer no more than the tolerance; 100 for none."""
    enough_correct = [row for row in record["sweep"] if row["correct"] >= record.plan.least_correct]
    return min((100 * row["energy"] for row in enough_correct), default=100.0)


def figure2_rows(records: list[Record]) -> list[dict]:
    """Figure 2, left: the layer at which the utilized rank of a VGG is largest."""
    rows = []
    for network in ("vgg11", "vgg19"):
        item = f"Figure 2: rank peak of {network.upper()} on CIFAR10"
        found = [record for record in records if is_plain(record, "cifar10", network)]
        peaks = [peak_layers(record)[0] for record in found]
        if not found:
            rows.append(missing(item, PAGES["Figure 2"], f"a record of cifar10/{network}"))
            continue
        mean = sum(peaks) / len(peaks)
        row = line(item, "peak layer", min(max(mean, PEAK[0]), PEAK[1]), peaks, found, PAGES["Figure 2"])
        rows.append(row | dict(paper=f"{PEAK[0]} to {PEAK[1]}"))
    return rows


def is_plain(record: Record, dataset: str, network: str) -> bool:
    """True for the full-width network of this name on this data set, trained from scratch."""
    experiment = record["experiment"]
    named = (experiment["dataset"], experiment["network"], experiment["width"]) == (dataset, network, 1)
    return named and not variant(record)


def style(frame: pd.DataFrame) -> Styler:
    """The measured rows of `table` as a page shows them."""
    shown = frame[frame["verdict"] != "not run"].copy()
    shown["item"] = [f'<a href="{page}.html">{item}</a>' for item, page in zip(shown["item"], shown["page"])]
    shown = shown.drop(columns=["page", "needs"]).set_index(["item", "quantity"])
    formats = {"paper": as_printed, "ours": "{:.4g}", "spread": "{:.2g}", "difference": "{:+.3g}"}
    table = styled(shown, "status", formats).map(lambda cell: COLORS.get(cell, ""), subset=["verdict"])
    return table.set_properties(subset=["device"], **WRAPPED | {"min-width": "12em"})


def as_printed(value: float | str) -> str:
    """A number of the paper's, or the range that its text gives."""
    return value if isinstance(value, str) else f"{value:.4g}"


def style_missing(frame: pd.DataFrame) -> Styler:
    """What was not run, and what it would need."""
    shown = frame[frame["verdict"] == "not run"].set_index("item")[["needs"]]
    return styled(shown, "status-missing", text=True)


def summary(frame: pd.DataFrame) -> str:
    """How many numbers agree, in one paragraph of Markdown."""
    counts = frame["verdict"].value_counts()
    measured = frame[frame["verdict"] != "not run"]
    return (
        f"**{len(measured)}** numbers in {measured['item'].nunique()} rows are measured: {counts.get('green', 0)} "
        f"green, {counts.get('amber', 0)} amber, {counts.get('red', 0)} red. **{counts.get('not run', 0)}** "
        f"rows are not run.{opposite_changes(measured)}"
    )


def opposite_changes(measured: pd.DataFrame) -> str:
    """How many accuracies move the other way than the paper's when a network is split and fine-tuned; "" for none."""
    changes = measured[measured["quantity"] == "change"]
    opposite = changes[changes["paper"] * changes["ours"] < 0]
    if opposite.empty:
        return ""
    return (
        f" Of {len(changes)} changes of accuracy by splitting and fine-tuning, **{len(opposite)}** have the other sign "
        f"than the paper's: {opposite['ours'].min():+.2f} to {opposite['ours'].max():+.2f} points where the paper "
        f"prints {opposite['paper'].min():+.1f} to {opposite['paper'].max():+.1f}."
    )


def margins() -> Styler:
    """The margins of the verdicts."""
    rows = {name: dict(green=f"up to {green:g}", amber=f"up to {amber:g}") for name, (green, amber) in MARGINS.items()}
    return styled(pd.DataFrame(rows).T.rename_axis("difference in"), "margins", text=True)


def outdated(name: str, committed: list[Record]) -> list[str]:
    """A sentence for each committed record that can no longer be shown beside the one called `name`."""
    records = {record.experiment.name: record for record in committed}
    published = records.pop(name)
    advice = "publish it from the same profile, or delete data/records/{}.json"
    otherwise = [
        f"{other} was run otherwise than {name}, and tables refuse the two: {advice.format(other)}"
        for other, record in records.items()
        if unseeded(other) == unseeded(name) and but_for_seed(record) != but_for_seed(published)
    ]
    return otherwise + [
        f"{other} is of other weights than {name} has now, and no longer compared with it: {advice.format(other)}"
        for other, record in records.items()
        if searched_again(record, name) and record["weights"] != published["weights"]
    ]


def searched_again(record: Record, name: str) -> bool:
    """Whether a record is of the very network that the experiment called `name` trained."""
    return record["experiment"]["start"] == name and record["experiment"]["train"]["epochs"] == 0
