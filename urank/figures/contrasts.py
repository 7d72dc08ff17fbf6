"""Which records are drawn together: those that differ in one thing."""

from collections.abc import Callable, Iterable, Sequence

from urank.records import Record, experiment_name

# Of a search, and what a record has that does not say it.
SETTINGS = dict(mode="joint", order="forward", holdout=0, validation=None)
USUAL = ("joint", "forward", 0)  # what `searched` says of most records


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
        key = (record["experiment"]["dataset"], record["experiment"]["network"], variant(record))
        if key not in lowest or record["experiment"]["seed"] < lowest[key]["experiment"]["seed"]:
            lowest[key] = record
    return list(lowest.values())


def variant(record: Record) -> str:
    """What tells the experiment from others of its network and data set; "" for the plain one."""
    return record["experiment"].get("variant") or ""


def family(network: str) -> str:
    """The name without its size: "vgg" for "vgg19"."""
    return network.rstrip("0123456789")


def families(records: Iterable[Record]) -> list[Record]:
    """Networks of one family on one data set, the most that the records have; [] where there are not two."""
    return largest(plain(records), lambda one: (one["dataset"], family(one["network"])))


def complexities(records: Iterable[Record]) -> list[Record]:
    """One network on data sets of more and of fewer classes; [] where there are not two."""
    return largest(plain(records), lambda one: one["network"])


def pretrainings(records: Iterable[Record]) -> list[Record]:
    """One network on one data set from scratch and from other weights, at one tolerance; [] where there are not two."""
    return largest(one_seed(beside_plain(records, from_other_weights)), place)


def comparisons(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What each panel of Figure 2 compares, by its title; [] where there are not two records for it."""
    return {
        "one family, one data set": families(records),
        "one network, two data sets": complexities(records),
        "one network, trained in several ways": pretrainings(records),
    }


def drawn_alone(records: Sequence[Record]) -> list[Record]:
    """The plain records that no comparison shows."""
    compared = [record for panel in comparisons(records).values() for record in panel]
    return [record for record in plain(records) if record not in compared]


def tolerances(records: Iterable[Record]) -> list[Record]:
    """One network on one data set searched at several tolerances, the strictest first; [] where there are not two."""
    chosen = largest(one_seed(beside_plain(records, at_another_tolerance)), place)
    return sorted(chosen, key=lambda record: record["experiment"]["tolerance"])


def protocols(records: Iterable[Record]) -> list[list[Record]]:
    """For each trained network that was searched in several ways at one tolerance, the usual way first."""
    groups = alike(one_seed(records), lambda one: (trained_network(one), one["tolerance"]))
    ordered = [sorted(group, key=lambda record: (searched(record) != USUAL, variant(record) != "")) for group in groups]
    unmixed = [[record for record in group if as_accurate(record, group[0])] for group in ordered]
    return [group for group in unmixed if len(group) > 1]


def beside_plain(records: Iterable[Record], belongs: Callable[[Record, Record], bool]) -> list[Record]:
    """The plain records, and of their variants those that `belongs` says yes to, asked with the plain one."""
    records = list(records)
    originals = {(place(one["experiment"]), one["experiment"]["seed"]): one for one in without_variants(records)}
    pairs = [(one, originals.get((place(one["experiment"]), one["experiment"]["seed"]))) for one in records]
    return [one for one, original in pairs if original and (one is original or variant(one) and belongs(one, original))]


def from_other_weights(one: Record, plain: Record) -> bool:
    return origin(one) != origin(plain) and searched(one) == searched(plain) and tolerance(one) == tolerance(plain)


def at_another_tolerance(one: Record, plain: Record) -> bool:
    return same_network(one, plain) and searched(one) == searched(plain) and tolerance(one) != tolerance(plain)


def same_network(one: Record, plain: Record) -> bool:
    """Whether a variant came to its weights as the plain network did; what was not trained must be that very one."""
    return origin(one) == origin(plain) and (one["experiment"]["train"]["epochs"] > 0 or as_accurate(one, plain))


def as_accurate(one: Record, other: Record) -> bool:
    """Whether both may be the very same network; on another device an image may fall to another class."""
    return abs(one["accuracy"]["original"] - other["accuracy"]["original"]) < 0.1


def trained_network(experiment: dict) -> tuple[tuple[str, str], str | None]:
    """Whose weights it searched: its own, where it trained them, another experiment's or published ones."""
    if experiment["train"]["epochs"] == 0:
        return place(experiment), experiment.get("start") or experiment.get("pretrained")
    return place(experiment), experiment_name(*place(experiment), experiment.get("variant", ""), experiment["seed"])


def origin(record: Record) -> tuple[str | None, str | None]:
    """What its weights were before they were trained: those of another experiment, published ones, seeded ones."""
    experiment = record["experiment"]
    taken_as_it_is = experiment["train"]["epochs"] == 0  # the experiment it starts from has its place
    return None if taken_as_it_is else experiment.get("start"), experiment.get("pretrained")


def settings(record: Record) -> dict:
    """All that decides how its ranks were searched, but the tolerance."""
    chosen = {name: record["experiment"].get(name, default) for name, default in SETTINGS.items()}
    return chosen | dict(calibration=record["calibration_images"])


def searched(record: Record) -> tuple[str, str, int]:
    """How its ranks were searched, the tolerance and the numbers of images apart."""
    chosen = settings(record)
    return chosen["mode"], chosen["order"], chosen["holdout"]


def tolerance(record: Record) -> float:
    return record["experiment"]["tolerance"]


def place(experiment: dict) -> tuple[str, str]:
    return experiment["dataset"], experiment["network"]


def largest(records: Iterable[Record], key: Callable[[dict], object]) -> list[Record]:
    """The largest set of records whose experiments agree in `key`, the first of several; [] where there are not two."""
    return max(alike(records, key), key=len, default=[])


def alike(records: Iterable[Record], key: Callable[[dict], object]) -> list[list[Record]]:
    """The sets of two or more records whose experiments agree in `key`."""
    groups: dict[object, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record["experiment"]), []).append(record)
    return [group for group in groups.values() if len(group) > 1]


def label(record: Record, among: Iterable[Record]) -> str:
    """What tells a record from the others it is drawn with, in few words."""
    experiments = [other["experiment"] for other in among]
    this = record["experiment"]
    if len(experiments) == 1 or len({one["network"] for one in experiments}) > 1:
        return this["network"]
    if len({one["dataset"] for one in experiments}) > 1:
        return this["dataset"]
    if len({one["tolerance"] for one in experiments}) > 1:
        return f"$\\epsilon$ = {this['tolerance']:g}"
    if len({origin(other) for other in among}) == 1:
        return protocol(record, next(iter(among)))
    return training(variant(record))


def protocol(record: Record, reference: Record) -> str:
    """How a network was searched, as far as that differs from how another one was; in words."""
    this, other = settings(record), settings(reference)
    words = dict(
        mode="each layer by itself" if this["mode"] == "isolated" else "jointly",
        order=this["order"],
        holdout=f"on {this['holdout']:,} held-out images" if this["holdout"] else "on test images",
        calibration=f"{this['calibration']:,} calibration images",
        validation=f"{this['validation'] or 'all'} validation images",
    )
    return ", ".join(words[name] for name in words if this[name] != other[name]) or "as everywhere else"


def training(variant: str) -> str:
    """How a network came to its weights, in words."""
    return variant.replace("-", " ") or "from scratch"
