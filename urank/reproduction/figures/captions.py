"""What the tables say, in one paragraph of Markdown each, computed from the records."""

from collections.abc import Callable, Sequence

from urank import datasets
from urank.reproduction import paper
from urank.reproduction.figures.selection import label, training, variant, without_variants
from urank.reproduction.figures.style import signed
from urank.reproduction.figures.tables import off, printed_row
from urank.reproduction.record import Record


def table1_caption(records: Sequence[Record]) -> str:
    """What the rows of Table 1 say together, variants left out."""
    records = without_variants(records)
    useless = sum(not entry.useful for record in records for entry in record.plan.layers)
    layers = sum(len(record.plan.layers) for record in records)
    return (
        f"{shares_used(records)} Of {layers} layers, {useless or 'none'} need a rank so high that two factors "
        f"would be no smaller. {accuracy_changes(records)}{near_chance(records)}"
    )


def shares_used(records: Sequence[Record]) -> str:
    """Which network has the smallest and which the largest MLU."""
    least, most = extremes(records, lambda record: record.plan.mlu)
    smallest = f"MLU {100 * least.plan.mlu:.0f} % (**{label(least, records)}**)"
    if len(records) == 1:
        return f"{smallest}."
    return f"{smallest}, the smallest, to {100 * most.plan.mlu:.0f} % (**{label(most, records)}**), the largest."


def near_chance(records: Sequence[Record]) -> str:
    """A warning where networks have learned so little that their utilization says nothing of trained ones."""
    chance = {id(record): 100 / datasets.CLASSES[record["experiment"]["dataset"]] for record in records}
    weak = [record for record in records if record["accuracy"]["original"] < 3 * chance[id(record)]]
    if not weak:
        return ""
    shares = ", ".join(
        f"{label(record, records)} {record['accuracy']['original']:.0f} %, chance {chance[id(record)]:g} %"
        for record in weak
    )
    return (
        f" Trained this briefly some are hardly better than chance ({shares}): their rows show that the page works on "
        "such a network, not what a trained one uses."
    )


def table3_caption(record: Record) -> str:
    """What a row of Table 3 says."""
    accuracy, experiment = record["accuracy"], record["experiment"]
    useful = [entry.layer for entry in record.plan.layers if entry.useful]
    return (
        f"**{experiment['network']} on {experiment['dataset']}.** Splitting all {len(record.plan.layers)} layers at "
        f"their utilized ranks takes the accuracy from {accuracy['original']:.2f} % to {accuracy['decomposed']:.2f} %; "
        f"{after_finetuning(record)}. {len(useful)} layers are smaller as two; with only these split the network has "
        f"{record['cost']['compact']['params'] / 1e6:.2f} M of {record['cost']['original']['params'] / 1e6:.2f} M "
        f"parameters and takes {record['cost']['compact']['macs'] / 1e6:.1f} M of "
        f"{record['cost']['original']['macs'] / 1e6:.1f} M MACs an image."
        f"{against_baseline(record)}{against_paper(record)}"
    )


def after_finetuning(record: Record) -> str:
    if not record.finetuned:
        return "it is not fine-tuned"
    epochs, accuracy = record["experiment"]["finetune"]["epochs"], record["accuracy"]["finetuned"]
    return f"{epochs} epochs of fine-tuning bring it to {accuracy:.2f} %"


def against_baseline(record: Record) -> str:
    """What the same fine-tuning does to the network that was not split, where that was run."""
    full = record["accuracy"]["baseline"]
    if full is None:
        return ""
    gap = record["accuracy"]["finetuned"] - full
    return (
        f" The full-rank network after the same fine-tuning reaches {full:.2f} %; the split one ends "
        f"{off(gap)} it, one run of each."
    )


def against_paper(record: Record) -> str:
    """How the original network stands to the paper's, where the paper has it; a gap is stated with the training."""
    printed = printed_row(record)
    if printed is None or variant(record):
        return ""
    gap, epochs = record["accuracy"]["original"] - printed["original_top1"], record["experiment"]["train"]["epochs"]
    return (
        f" The paper's original reaches {printed['original_top1']:.1f} %; this one, after {epochs} epochs of training, "
        f"stands {off(gap)} it."
    )


def table4_caption(records: Sequence[Record]) -> str:
    """What the rows of Table 4 say together: how pretraining changes what is used."""
    shares = ", ".join(f"{training(variant(record))} {100 * record.plan.mlu:.0f} %" for record in records)
    least, most = extremes(records, lambda record: record.plan.mlu)
    return (
        f"MLU: {shares}. It is highest for **{training(variant(most))}**, lowest for **{training(variant(least))}**."
        f"{against_papers_order(records)}{without_probes(records)}{unsteady(records)}"
    )


def without_probes(records: Sequence[Record]) -> str:
    """How the accuracies move; a linear probe, whose trunk was frozen until it was split, is named by itself."""
    probes = [record for record in records if variant(record) == "linear-probe" and record.finetuned]
    others = [record for record in records if record not in probes]
    changes = f" {accuracy_changes(others)}" if others else ""
    return changes + "".join(
        f" The {training(variant(probe))}'s {signed(gain(probe))} says nothing of the method: its original has a "
        f"frozen trunk, the split network was fine-tuned as a whole."
        for probe in probes
    )


def unsteady(records: Sequence[Record]) -> str:
    """A warning where one architecture was timed at so different speeds that the column *speed* says nothing."""
    timed = [rows[0] for rows in map(timings_of_original, records) if rows]
    speeds = [row["images_per_second"] for row in timed]
    if len({row["device"] for row in timed}) != 1 or max(speeds) < 1.5 * min(speeds):
        return ""
    return (
        f" The original networks, which are of one architecture, were timed at {min(speeds):.0f} to {max(speeds):.0f} "
        "images a second: the machine was not at rest, and *speed* says nothing here."
    )


def timings_of_original(record: Record) -> list[dict]:
    """How fast it is by 256 images, the first first."""
    return [row for row in record["latency"] if (row["network"], row["batch"]) == ("original", 256)]


def against_papers_order(records: Sequence[Record]) -> str:
    """Whether the rows of Table 4 come in the paper's order of MLU; nothing where the paper lacks one of them."""
    printed = paper.table4().set_index("variant")["mlu"]
    ways = [variant(record) for record in sorted(records, key=lambda record: record.plan.mlu, reverse=True)]
    if not set(ways) <= set(printed.index):
        return ""
    theirs = sorted(ways, key=printed.get, reverse=True)
    order = "the same" if ways == theirs else f"another: {', '.join(training(way) for way in theirs)}"
    return f" The paper's order, from the highest, is {order}."


def table5_caption(records: Sequence[Record]) -> str:
    """What the rows of Table 5 say together: what a looser tolerance buys, and what it costs after fine-tuning."""
    if len(records) == 1:
        return f"Searched at one tolerance alone, $\\epsilon$ = {records[0]['experiment']['tolerance']:g} points."
    strict, loose = extremes(records, lambda record: record["experiment"]["tolerance"])
    after = f", after it from {strict['accuracy']['finetuned']:.1f} % to {loose['accuracy']['finetuned']:.1f} %"
    after = after if strict.finetuned and loose.finetuned else ""
    return (
        f"From $\\epsilon$ = {strict['experiment']['tolerance']:g} to {loose['experiment']['tolerance']:g} points the "
        f"MLU goes from {100 * strict.plan.mlu:.0f} % to {100 * loose.plan.mlu:.0f} % and the parameters from "
        f"x {strict.params_ratio:.2f} to x {loose.params_ratio:.2f}, while the accuracy before fine-tuning goes from "
        f"{strict['accuracy']['projected']:.1f} % to {loose['accuracy']['projected']:.1f} %{after}.{recovered(records)}"
    )


def recovered(records: Sequence[Record]) -> str:
    """How many networks are back at the original's accuracy after fine-tuning; "" where one was not fine-tuned."""
    if not all(record.finetuned for record in records):
        return ""
    original, back = records[0]["accuracy"]["original"], sum(gain(record) >= 0 for record in records)
    return f" The original has {original:.1f} %; {back or 'none'} of {len(records)} are back there."


def accuracy_changes(records: Sequence[Record]) -> str:
    """From where to where the accuracies move; only before fine-tuning where a network was not fine-tuned."""
    worst, best = extremes(records, gain)
    finetuned = sum(record.finetuned for record in records)
    how = "fine-tuned" if finetuned == len(records) else f"{finetuned} of {len(records)} fine-tuned"
    low, high = signed(gain(worst)), signed(gain(best))
    if low == high:
        names = " and ".join(label(record, records) for record in records)
        return f"Split and {how}, accuracy moves by {low} points ({names})."
    return (
        f"Split and {how}, accuracy moves by {low} ({label(worst, records)}) to {high} points ({label(best, records)})."
    )


def gain(record: Record) -> float:
    """Accuracy points between the original network and the split one after fine-tuning."""
    return record["accuracy"]["finetuned"] - record["accuracy"]["original"]


def extremes(records: Sequence[Record], key: Callable[[Record], float]) -> tuple[Record, Record]:
    """The records with the smallest and the largest value of `key`, the first of several."""
    return min(records, key=key), max(records, key=key)
