"""Which records are drawn together: those that differ in one thing."""

from collections.abc import Callable, Iterable

from urank.records import Record


def plain(records: Iterable[Record]) -> list[Record]:
    """Networks trained from their initial weights, one record each: that of the lowest seed."""
    return [record for record in one_seed(records) if not variant(record)]


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
    return beside_plain(records, lambda one, plain: one["train"]["epochs"] > 0 and searched(one) == searched(plain))


def tolerances(records: Iterable[Record]) -> list[Record]:
    """One network on one data set searched at several tolerances, the strictest first; [] where there are not two."""
    found = beside_plain(
        records, lambda one, plain: one["tolerance"] != plain["tolerance"] and one["mode"] == plain["mode"]
    )
    return sorted(found, key=lambda record: record["experiment"]["tolerance"])


def beside_plain(records: Iterable[Record], belongs: Callable[[dict, dict], bool]) -> list[Record]:
    """The largest set of a plain record and those variants of it that belong to it."""
    records = one_seed(records)
    scratch = {place(record): record["experiment"] for record in plain(records)}
    chosen = [
        record
        for record in records
        if place(record) in scratch and (not variant(record) or belongs(record["experiment"], scratch[place(record)]))
    ]
    return largest(chosen, lambda one: (one["dataset"], one["network"]))


def searched(experiment: dict) -> tuple[float, str]:
    """How its ranks were searched."""
    return experiment["tolerance"], experiment["mode"]


def place(record: Record) -> tuple[str, str]:
    return record["experiment"]["dataset"], record["experiment"]["network"]


def largest(records: Iterable[Record], key: Callable[[dict], object]) -> list[Record]:
    """The largest set of records whose experiments agree in `key`, the first of several; [] where there are not two."""
    groups: dict[object, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record["experiment"]), []).append(record)
    found = max(groups.values(), key=len, default=[])
    return found if len(found) > 1 else []


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
    return training(variant(record))


def training(variant: str) -> str:
    """How a network came to its weights, in words."""
    return variant.replace("-", " ") or "from scratch"
