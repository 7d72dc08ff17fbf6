"""How far the reproduction is: one row per number of the papers' tables and figures, from the committed records.

`predictors` compares the differences with those of a constant: a measurement is informative if it is closer to the
paper's numbers than one number for all networks on a data set is. A row that is not measured says what it needs.
"""

from statistics import mean

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction import paper, profiles
from urank.reproduction.cost_estimates import needs, needs_training
from urank.reproduction.figures import variations
from urank.reproduction.figures.groups import (
    at_another_tolerance,
    from_other_weights,
    variant,
    with_variants,
    without_variants,
)
from urank.reproduction.figures.runs import devices
from urank.reproduction.figures.snapshot import peak_layers
from urank.reproduction.figures.spectra import sweep_table
from urank.reproduction.figures.style import WRAPPED, styled
from urank.reproduction.figures.tables import (
    PRINTED,
    SAME,
    by_row,
    interval,
    measured_row,
    printed_row,
    unseeded,
    without_seed,
)
from urank.reproduction.paper_networks import PARAMETER_EFFICIENT
from urank.reproduction.record import Record

QUANTITIES = {
    "original %": "original_top1",
    "change": "delta",
    "MLU of W %": "original_mlu",
    "MLU %": "mlu",
    "params": "params_ratio",
    "MACs": "flops_ratio",
}
PAGES = {"Table 1": "table1_imagenet", "Table 3": "table3_cifar", "Table 4": "table4_pretraining"}
PAGES |= {"Table 5": "table5_tolerance", "Figure 1": "figure1_spectra", "Figure 2": "figure2_snapshots"}
PAGES |= {"Second paper": "pe_table"}
BELOW, ABOVE = "0, 114, 178", "213, 94, 0"  # blue and orange: safe for colour-blind readers
NULL = "error of the paper's mean"
CHANGES = ["change", "full rank, change", "fine-tuned − full rank"]
COLUMNS = ["item", "quantity", "paper", "ours", "low", "high", "difference", "runs", "date", "page"]
COLUMNS += ["device", "needs", "dataset"]
# The words that name a row, beside the number of its table.
LABELS = {1: ["model"], 3: ["model", "dataset"], 4: ["model"], 5: ["model", "tolerance"]}
PEAK = (4, 6)  # the layers around which the rank of the paper's VGGs peaks (Figure 2, left)


def table(records: list[Record] | None = None) -> pd.DataFrame:
    """Return every number of the papers' tables and figures beside the measured one.

    Args:
        records: default all committed records.

    Returns:
        The columns of `COLUMNS`. `ours` is the mean over `runs` seeds, and `low` and `high` are the ends of its
        `interval` (nan for one run). A row that is not run has no runs; `needs` says what it takes.
    """
    records = profiles.recorded() if records is None else records
    rows = figure1_rows(records) + figure2_rows(records)
    for number in PRINTED:
        rows += table_rows(number, [one for one in records if one.experiment.width == 1])
    return pd.DataFrame(rows + second_paper_rows(), columns=COLUMNS)


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
    low, high = interval(ours)
    return dict(
        item=item,
        quantity=quantity,
        paper=printed,
        ours=mean(ours),
        low=low,
        high=high,
        runs=len(ours),
        difference=mean(ours) - printed,
        device=devices(seeds),
        date=max(record.date for record in seeds),
        page=PAGES[where],
        needs="",
        dataset=seeds[0].experiment.dataset,
    )


def missing(item: str, where: str, needed: str) -> dict:
    return dict(item=item, quantity="", runs=0, page=PAGES[where], needs=needed)


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
    return sweep_table(record)["energy %"].fillna(100.0).min()


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


def second_paper_rows() -> list[dict]:
    """Return the printed sizes of networks with tied matrices beside ours, and what their accuracies need."""
    printed, rows = paper.table("pe_table"), []
    own = printed[~printed["model"].str.startswith("peer")]
    for model, entries in own.groupby("model", sort=False):
        item = f"Second paper: {model}"
        if model not in PARAMETER_EFFICIENT:
            rows.append(missing(item, "Second paper", "the printed numbers: they could not be recovered"))
            continue
        cost, without_classifier = paper.parameter_efficient_cost(model)
        rows.append(size_row(item, entries["pe_params_M"].iloc[0], without_classifier / 1e6))
        for epochs in entries["epochs"]:
            training = f"{epochs:.0f} epochs" if epochs == epochs else "accuracy"
            rows.append(missing(f"{item}, {training}", "Second paper", needs_training(cost.macs, epochs)))
    return rows


def size_row(item: str, printed: float, ours: float) -> dict:
    """Return the row of a number of parameters in millions; it is counted, so it has neither a device nor a date."""
    counted = dict(runs=1, device="counted", date="", needs="", dataset="", page=PAGES["Second paper"])
    numbers = dict(paper=printed, ours=ours, difference=ours - printed)
    return dict(item=item, quantity="params (M), no classifier") | numbers | counted


def is_base(record: Record, dataset: str, network: str) -> bool:
    """Whether the record is of this network on this data set, at full width and without a variant."""
    chosen = record.experiment
    return (chosen.dataset, chosen.network, chosen.width, variant(record)) == (dataset, network, 1, "")


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `table` that are measured."""
    return frame[frame["runs"] > 0]


def predictors(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, by quantity, how far the measured numbers are from the paper's, and how far two constants are.

    Returns:
        `bias`: mean of ours - paper; `correlation` over the rows, and after the mean of each data set is subtracted;
        `mean error`: mean of |ours - paper|; `error of our mean` and `error of the paper's mean`: the same with one
        number for all networks on a data set, the mean of that column. Only the quantities of tables.
    """
    groups = measured(frame).groupby("quantity", sort=False)
    rows = {name: predictor_row(of) for name, of in groups if name in QUANTITIES}
    return pd.DataFrame(rows).T.astype({"rows": int}).rename_axis("quantity") if rows else pd.DataFrame()


def predictor_row(rows: pd.DataFrame) -> dict[str, float]:
    both = rows[["ours", "paper"]].astype(float)
    means = both.groupby(rows["dataset"]).transform("mean")
    inside = both - means
    errors = [(value - both["paper"]).abs().mean() for value in (both["ours"], means["ours"], means["paper"])]
    return {
        "rows": len(both),
        "bias": (both["ours"] - both["paper"]).mean(),
        "correlation": both["ours"].corr(both["paper"]),
        "within a data set": inside["ours"].corr(inside["paper"]),
        **dict(zip(("mean error", "error of our mean", NULL), errors)),
    }


def informative(frame: pd.DataFrame) -> list[str]:
    """Return the quantities in which ours are closer to the paper's numbers than both constants are."""
    found = predictors(frame)
    return [name for name, row in found.iterrows() if row["mean error"] < row[["error of our mean", NULL]].min()]


def style_predictors(frame: pd.DataFrame) -> Styler:
    """Return `predictors` as a page shows it."""
    found = predictors(frame)
    return styled(found, "predictors", dict.fromkeys(found, "{:.2f}") | {"rows": "{:d}", "bias": "{:+.2f}"})


def against_full_rank(records: list[Record] | None = None) -> pd.DataFrame:
    """Return the changes of accuracy, in points, of the networks of Table 3 and of their full-rank networks.

    Returns:
        Of several seeds the mean: `change` of the split network, `full rank, change` of the original after the same
        fine-tuning, and `fine-tuned − full rank` with the ends `low` and `high` of its interval (nan for one run); nan
        where the full-rank network was not run.
    """
    records = profiles.recorded() if records is None else records
    shown = [record for record in without_variants(records) if printed_row(record) is not None]
    rows = {}
    for place, seeds in by_row(shown, SAME).items():
        frame = variations.rows(seeds, [record.experiment.seed for record in seeds]).reindex(columns=CHANGES)
        low, high = interval(frame[CHANGES[-1]])
        rows[place] = frame.mean(skipna=False).to_dict() | dict(low=low, high=high, runs=len(seeds))
    return pd.DataFrame(rows).T.rename_axis(SAME)


def heat_map(frame: pd.DataFrame) -> Styler:
    """Return ours - paper as a page shows it: rows by quantities, blue below the paper and orange above it.

    The colour is full at twice the error of the paper's mean (see `predictors`).
    """
    shown = measured(frame)
    shown = linked(shown[shown["quantity"].isin(QUANTITIES)])
    text = shown.assign(text=[difference_text(row) for row in shown.to_dict("records")])
    wide = [one.pivot(index="item", columns="quantity")[name] for one, name in ((text, "text"), (shown, "difference"))]
    cells, differences = (one.reindex(shown["item"].unique())[list(QUANTITIES)] for one in wide)
    shades = (differences / (2 * predictors(frame)[NULL])).map(background)
    table = styled(cells.rename_axis(index=None, columns=None), "status-map").format(na_rep="–")
    return table.apply(lambda _: shades, axis=None)


def linked(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with items that link to their pages."""
    return rows.assign(item=[f'<a href="{page}.html">{item}</a>' for item, page in zip(rows["item"], rows["page"])])


def difference_text(row: dict) -> str:
    """Return ours - paper, with its interval where there are several seeds."""
    digits = 2 if row["quantity"] in ("change", "params", "MACs") else 1
    ends = [f"{row[end] - row['ours'] + row['difference']:+.{digits}f}" for end in ("low", "high")]
    return f"{row['difference']:+.{digits}f}" + ("" if row["runs"] == 1 else f" ({' to '.join(ends)})")


def background(share: float) -> str:
    """Return a cell's colour, transparent at 0 and full at -1 and 1; legible on light and dark pages."""
    if pd.isna(share):
        return ""
    return f"background-color: rgba({BELOW if share < 0 else ABOVE}, {0.6 * min(1, abs(share)):.2f})"


def style(frame: pd.DataFrame) -> Styler:
    """Return the measured rows of `table` as a page shows them."""
    shown = linked(measured(frame)).drop(columns=["page", "needs", "dataset"]).set_index(["item", "quantity"])
    formats = {"paper": as_printed, **dict.fromkeys(["ours", "low", "high"], "{:.4g}"), "difference": "{:+.3g}"}
    return styled(shown, "status", formats).set_properties(subset=["device"], **WRAPPED | {"min-width": "12em"})


def as_printed(value: float | str) -> str:
    """Return a printed number, or the range that the text gives."""
    return value if isinstance(value, str) else f"{value:.4g}"


def style_missing(frame: pd.DataFrame) -> Styler:
    """Return what is not run, and what it needs."""
    return styled(frame[frame["runs"] == 0].set_index("item")[["needs"]], "status-missing", text=True)


def summary(frame: pd.DataFrame) -> str:
    """Return how many numbers are measured, and which quantities say more than a constant, in one line."""
    return (
        f"{len(measured(frame))} numbers measured, {(frame['runs'] == 0).sum()} rows not run; closer to the paper than "
        f"a constant: {', '.join(informative(frame)) or 'no quantity'}"
    )


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
