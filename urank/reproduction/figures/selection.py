"""Which records are drawn together: those that differ in one thing."""

from collections.abc import Callable, Iterable, Sequence

from urank.reproduction.record import Record
from urank.training.recipe import what_is_fitted

# Of a search, and what a record has that does not say it.
SETTINGS = ("mode", "order", "holdout", "validation")


def plain(records: Iterable[Record]) -> list[Record]:
    """Networks that are no variant of another, one record each: that of the lowest seed."""
    return one_seed(without_variants(records))


def without_variants(records: Iterable[Record]) -> list[Record]:
    """The plain records of all seeds."""
    return [record for record in records if not variant(record)]


def one_seed(records: Iterable[Record]) -> list[Record]:
    """One record an experiment, that of its lowest seed, in the order in which the experiments come."""
    lowest: dict[tuple, Record] = {}
    for record in records:
        key = (*place(record), variant(record))
        if key not in lowest or seed(record) < seed(lowest[key]):
            lowest[key] = record
    return list(lowest.values())


def variant(record: Record) -> str:
    """What tells the experiment from others of its network and data set; "" for the plain one."""
    return record["experiment"]["variant"]


def family(record: Record) -> str:
    return family_of(record["experiment"]["network"])


def family_of(network: str) -> str:
    """A network's name without its size: "vgg" for "vgg19"."""
    return network.rstrip("0123456789")


def repeated(records: Iterable[Record]) -> list[list[Record]]:
    """For each plain network that was trained from several seeds, a record a seed, the lowest first."""
    return [sorted(group, key=seed) for group in alike(without_variants(records), place)]


def families(records: Iterable[Record]) -> list[list[Record]]:
    """For each family of networks and each data set, the networks of the one on the other, where there are two."""
    return alike(plain(records), lambda record: (place(record)[0], family(record)))


def complexities(records: Iterable[Record]) -> list[list[Record]]:
    """For each network that was trained on several data sets, one record of each."""
    return alike(plain(records), lambda record: record["experiment"]["network"])


def pretrainings(records: Iterable[Record]) -> list[Record]:
    """One network on one data set from scratch and from other weights, at one tolerance; [] where there are not two."""
    return largest(beside_plain(records, from_other_weights), place_and_seed)


def comparisons(records: Sequence[Record]) -> dict[str, list[list[Record]]]:
    """What the panels of Figure 2 compare, by their title; [] where there are no two records for one."""
    return {
        "one family, one data set": families(records),
        "one network, two data sets": complexities(records),
        "one network, trained in several ways": [ways for ways in [pretrainings(records)] if ways],
    }


def compared(records: Sequence[Record]) -> list[Record]:
    """The records that some panel of Figure 2 draws."""
    return [record for panels in comparisons(records).values() for panel in panels for record in panel]


def drawn_alone(records: Sequence[Record]) -> list[Record]:
    """The plain records that no comparison shows."""
    shown = compared(records)
    return [record for record in plain(records) if record not in shown]


def tolerances(records: Iterable[Record]) -> list[Record]:
    """One network on one data set searched at several tolerances, the strictest first; [] where there are not two."""
    chosen = largest(beside_plain(records, at_another_tolerance), place_and_seed)
    return sorted(chosen, key=tolerance)


def protocols(records: Iterable[Record]) -> list[list[Record]]:
    """For each trained network that was searched in several ways at one tolerance, one record a way, the usual first.

    Of a network that was trained with several seeds, the lowest.
    """
    searches = alike(records, lambda record: (record["weights"], tolerance(record)))
    ordered = [one_a_way(sorted(group, key=unusual)) for group in searches]
    return lowest_seed([ways for ways in ordered if len(ways) > 1])


def one_a_way(records: Iterable[Record]) -> list[Record]:
    """The first record of each way of searching; others may differ from it in how they were fine-tuned."""
    ways: dict[tuple, Record] = {}
    for record in records:
        ways.setdefault(tuple(settings(record).values()), record)
    return list(ways.values())


def finetunings(records: Iterable[Record]) -> list[list[Record]]:
    """For each network that was fine-tuned in several ways after one search, a record a way, the shortest first."""
    return ways(records, finetuned_otherwise, finetuning_epochs)


def trainings(records: Iterable[Record]) -> list[list[Record]]:
    """For each network that was trained in several ways from seeded weights, a record a way, the shortest first."""
    return ways(records, trained_otherwise, training_epochs)


def ways(
    records: Iterable[Record], belongs: Callable[[Record, Record], bool], epochs: Callable[[Record], int]
) -> list[list[Record]]:
    """Plain records of one seed with those of their variants that belong to them, the fewest epochs first."""
    groups = alike(beside_plain(records, belongs), place_and_seed)
    return lowest_seed([sorted(group, key=epochs) for group in groups])


def lowest_seed(groups: list[list[Record]]) -> list[list[Record]]:
    """Of groups whose first records differ in the seed alone, that of the lowest."""
    chosen = one_seed(group[0] for group in groups)
    return [group for group in groups if group[0] in chosen]


def beside_plain(records: Iterable[Record], belongs: Callable[[Record, Record], bool]) -> list[Record]:
    """The plain records, and of their variants those that `belongs` says yes to, asked with the plain one."""
    records = list(records)
    originals = {place_and_seed(one): one for one in without_variants(records)}
    pairs = [(one, originals.get(place_and_seed(one))) for one in records]
    return [one for one, original in pairs if original and (one is original or variant(one) and belongs(one, original))]


def from_other_weights(one: Record, original: Record) -> bool:
    return origin(one) != origin(original) and searched_alike(one, original)


def at_another_tolerance(one: Record, original: Record) -> bool:
    same_network = one["weights"] == original["weights"]
    return same_network and settings(one) == settings(original) and tolerance(one) != tolerance(original)


def finetuned_otherwise(one: Record, original: Record) -> bool:
    same_network = one["weights"] == original["weights"] and ranks(one) == ranks(original)
    return same_network and one.finetuned and recipe(one, "finetune") != recipe(original, "finetune")


def trained_otherwise(one: Record, original: Record) -> bool:
    seeded = origin(one) == origin(original) == (None, None)
    other_network = one["weights"] != original["weights"] and recipe(one, "train") != recipe(original, "train")
    return seeded and other_network and searched_alike(one, original)


def searched_alike(one: Record, other: Record) -> bool:
    """Whether networks of one width were searched in one way."""
    same_search = settings(one) == settings(other) and tolerance(one) == tolerance(other)
    return same_search and width(one) == width(other)


def recipe(record: Record, fit: str) -> dict:
    """Of the fit called `fit`, as far as it decides what is fitted."""
    return what_is_fitted(record["experiment"][fit])


def origin(record: Record) -> tuple[str | None, str | None]:
    """What its weights were before they were trained: those of another experiment, published ones, seeded ones."""
    experiment = record["experiment"]
    taken_as_it_is = experiment["train"]["epochs"] == 0  # the experiment it starts from has its place
    return None if taken_as_it_is else experiment["start"], experiment["pretrained"]


def settings(record: Record) -> dict:
    """All that decides how its ranks were searched, but the tolerance."""
    chosen = {name: record["experiment"][name] for name in SETTINGS}
    return chosen | dict(calibration=record["calibration_images"])


def unusual(record: Record) -> tuple[bool, bool]:
    """A sorting key: networks searched jointly, forward and on test images come first, of these the plain one."""
    chosen = settings(record)
    return (chosen["mode"], chosen["order"], chosen["holdout"]) != ("joint", "forward", 0), variant(record) != ""


def tolerance(record: Record) -> float:
    return record["experiment"]["tolerance"]


def ranks(record: Record) -> list[int]:
    return [entry.rank for entry in record.plan.layers]


def training_epochs(record: Record) -> int:
    return record["experiment"]["train"]["epochs"]


def finetuning_epochs(record: Record) -> int:
    return record["experiment"]["finetune"]["epochs"]


def seed(record: Record) -> int:
    return record["experiment"]["seed"]


def width(record: Record) -> float:
    return record["experiment"]["width"]


def place(record: Record) -> tuple[str, str]:
    return record["experiment"]["dataset"], record["experiment"]["network"]


def place_and_seed(record: Record) -> tuple[str, str, int]:
    return *place(record), seed(record)


def largest(records: Iterable[Record], key: Callable[[Record], object]) -> list[Record]:
    """The largest set of records that agree in `key`, the first of several; [] where there are not two."""
    return max(alike(records, key), key=len, default=[])


def alike(records: Iterable[Record], key: Callable[[Record], object]) -> list[list[Record]]:
    """The sets of two or more records that agree in `key`."""
    groups: dict[object, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return [group for group in groups.values() if len(group) > 1]


def label(record: Record, among: Iterable[Record]) -> str:
    """What tells a record from the others it is shown with, in few words; its network where it is alone."""
    among = list(among)
    this, others = record["experiment"], [other["experiment"] for other in among]
    words = [this[name] for name in ("network", "dataset") if any(other[name] != this[name] for other in others)]
    if any(other["tolerance"] != this["tolerance"] for other in others):
        words.append(f"$\\epsilon$ = {this['tolerance']:g}")
    twins = [other for other in among if place(other) == place(record) and other["weights"] != record["weights"]]
    if any(variant(other) != variant(record) for other in twins):
        words.append(training(variant(record)))
    if any(seed(other) != seed(record) for other in twins):
        words.append(f"seed {seed(record)}")
    if not words and len(among) > 1:
        words.append(protocol(record, among))
    return ", ".join(words) or this["network"]


def common(records: Sequence[Record]) -> str:
    """The network and the data set, each where all records agree in it."""
    names = [{record["experiment"][name] for record in records} for name in ("network", "dataset")]
    return " on ".join(one for several in names if len(several) == 1 for one in several)


def protocol(record: Record, among: Sequence[Record]) -> str:
    """How a network was searched, as far as that differs from how it was for the first of `among`; in words."""
    this, other = settings(record), settings(among[0])
    words = dict(
        mode="each layer by itself" if this["mode"] == "isolated" else "jointly",
        order=this["order"],
        holdout=f"on {this['holdout']:,} held-out images" if this["holdout"] else "on test images",
        calibration=f"with {this['calibration']:,} calibration images",
        validation=f"with {this['validation'] or 'all'} validation images",
    )
    # A network that was trained without some images is not what other pages show: its first search has another name.
    usual = words["holdout"] if any(settings(one)["holdout"] for one in among) else "default"
    return ", ".join(words[name] for name in words if this[name] != other[name]) or usual


def training(variant: str) -> str:
    """How a network came to its weights, in words."""
    return variant.replace("-", " ") or "from scratch"
