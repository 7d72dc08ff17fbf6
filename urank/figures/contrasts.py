"""Which records are drawn together: those that differ in one thing."""

from collections.abc import Callable, Iterable

from urank.records import Record


def plain(records: Iterable[Record]) -> list[Record]:
    """Networks trained from their initial weights, one record each: that of the lowest seed."""
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
    chosen = beside_plain(records, lambda one, plain: origin(one) != origin(plain) and searched(one) == searched(plain))
    return largest(chosen, place)


def tolerances(records: Iterable[Record]) -> list[Record]:
    """One network on one data set searched at several tolerances, the strictest first; [] where there are not two."""
    chosen = beside_plain(records, lambda one, plain: origin(one) == origin(plain) and only_tolerance(one, plain))
    return sorted(largest(chosen, place), key=lambda record: record["experiment"]["tolerance"])


def protocols(records: Iterable[Record]) -> list[list[Record]]:
    """For each network on a data set that was searched in several ways at one tolerance, the plain record first."""
    chosen = beside_plain(
        records, lambda one, plain: origin(one) == origin(plain) and one["tolerance"] == plain["tolerance"]
    )
    return [sorted(group, key=lambda record: variant(record) != "") for group in alike(chosen, place)]


def beside_plain(records: Iterable[Record], belongs: Callable[[dict, dict], bool]) -> list[Record]:
    """The plain records and those variants of each that belong to it."""
    records = one_seed(records)
    scratch = {place(record["experiment"]): record["experiment"] for record in plain(records)}
    return [
        record
        for record in records
        if (original := scratch.get(place(record["experiment"]))) is not None
        and (not variant(record) or belongs(record["experiment"], original))
    ]


def origin(experiment: dict) -> tuple[str | None, str | None]:
    """What its weights were before they were trained: those of another experiment, published ones, seeded ones."""
    taken_as_it_is = experiment["train"]["epochs"] == 0  # the experiment it starts from has its place
    return None if taken_as_it_is else experiment.get("start"), experiment.get("pretrained")


def searched(experiment: dict) -> tuple[float, str, int]:
    """How its ranks were searched."""
    return experiment["tolerance"], experiment["mode"], experiment.get("holdout", 0)


def only_tolerance(one: dict, other: dict) -> bool:
    """Whether two searches differ in the tolerance and in nothing else."""
    return one["tolerance"] != other["tolerance"] and searched(one)[1:] == searched(other)[1:]


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
    if len({origin(one) for one in experiments}) == 1:
        return protocol(this)
    return training(variant(record))


def protocol(experiment: dict) -> str:
    """How a network was searched, where it was not as all others are; in words."""
    ways = [
        "each layer by itself" * (experiment["mode"] == "isolated"),
        "backward" * (experiment.get("order") == "backward"),
        f"{experiment['calibration']:,} calibration images" if experiment["calibration"] else "",
        f"on {experiment['holdout']:,} held-out images" if experiment.get("holdout") else "",
    ]
    return ", ".join(filter(None, ways)) or "as everywhere else"


def training(variant: str) -> str:
    """How a network came to its weights, in words."""
    return variant.replace("-", " ") or "from scratch"
