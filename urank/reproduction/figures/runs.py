"""Which run the numbers come from, and the search behind one record."""

from collections.abc import Iterable, Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.plan import NOT_RECORDED
from urank.reproduction.figures.style import WRAPPED, styled
from urank.reproduction.record import Record


def run_table(records: Sequence[Record], identifier: str) -> Styler:
    """Return one row per run: how it was trained and searched, for how long, where, and by which code."""
    rows = {}
    for record in records:
        experiment = record.experiment
        rows[experiment.name] = {
            "layers": len(record.plan.layers),
            "width": f"{experiment.width:g}",
            "epochs": f"{experiment.train.epochs} + {experiment.finetune.epochs}",
            "tolerance": f"{experiment.tolerance:g}",
            "calibration images": record.calibration_images,
            "search images": record.plan.total,
            "seed": experiment.seed,
            "minutes": f"{sum(record.seconds.values()) / 60:.1f}",
            "device": devices([record]),
            "date": record.date,
            "commit": commits(record),
        }
    table = styled(pd.DataFrame(rows).T.rename_axis("run"), identifier)
    return table.set_properties(subset=["device"], **WRAPPED)


def run_details(record: Record) -> Styler:
    """Return everything about one run: network, data, recipe, seed, device, versions, seconds per stage."""
    experiment = record.experiment
    start = experiment.start or experiment.pretrained
    rows = {
        "network": f"{experiment.network}, width {experiment.width:g}",
        "data set": experiment.dataset,
        **({"started from": start} if start else {}),
        "epochs of training": experiment.train.epochs,
        "epochs of fine-tuning": experiment.finetune.epochs,
        "tolerance": f"{experiment.tolerance:g} points",
        "search": f"{experiment.mode}, {experiment.order}",
        "search images": f"{record.plan.total} {record.consulted} images",
        "calibration images": record.calibration_images,
        "seed": experiment.seed,
        "device": devices([record]),
        "precision of training": precisions(record),
        "date": record.date,
        "commit": commits(record),
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
        "seconds": ", ".join(f"{stage} {time:.0f}" for stage, time in record.seconds.items()),
    }
    return styled(pd.DataFrame({"": rows}), html_name("run", record), text=True).hide(axis="columns")


def plan_table(record: Record) -> Styler:
    """Return one row per layer: W is d x m, the search kept k_S and k_T dimensions, the ranks of W and W'."""
    return styled(record.plan.to_frame(), html_name("plan", record)).hide(axis="index")


def probes_table(record: Record, layer: str) -> Styler:
    """Return the probes of one layer in order; a probe that was ended early has no count."""
    probes = record.plan.probes_frame()
    table = styled(probes[probes["layer"] == layer], html_name("probes", record))
    return table.format(na_rep="").hide(axis="index")


def html_name(kind: str, record: Record) -> str:
    """Return a name for a table's HTML that is the same in each run and differs between records."""
    chosen = record.experiment
    parts = (kind, chosen.dataset, chosen.network, chosen.variant, f"s{chosen.seed}")
    return "-".join(part for part in parts if part).replace("/", "-").replace(".", "-")


def devices(records: Iterable[Record]) -> str:
    """Return every device that computed a stage of the records."""
    return "; ".join(sorted(set().union(*(record.devices() for record in records))))


def commits(record: Record) -> str:
    """Return the git commits that computed the stages, marked where the working tree had changes."""
    marks = {True: "", False: " with changes"}
    found = [
        f"{made['commit']}{marks.get(made.get('clean'), '')}" for made in record.made.values() if made.get("commit")
    ]
    return ", ".join(dict.fromkeys(found)) or NOT_RECORDED


def precisions(record: Record) -> str:
    """Return the arithmetic of the training epochs; the oldest records do not contain it."""
    noted = {epoch.get("precision", NOT_RECORDED) for epochs in record.history.values() for epoch in epochs}
    return ", ".join(sorted(noted)) or "–"
