"""Groups of records that differ in one thing, and labels that name the difference.

A record without a variant is a *base record*. Variants differ from the base record of their network and data set in one
setting: how it was searched, trained or fine-tuned, or the weights it started from.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from urank.reproduction.record import Record
from urank.training.recipe import result_fields

Groups = list[list[Record]]

seed = attrgetter("experiment.seed")
variant = attrgetter("experiment.variant")
tolerance = attrgetter("experiment.tolerance")
training_epochs = attrgetter("experiment.train.epochs")
finetuning_epochs = attrgetter("experiment.finetune.epochs")
place = attrgetter("experiment.dataset", "experiment.network")
place_and_seed = attrgetter("experiment.dataset", "experiment.network", "experiment.seed")
# How the ranks were searched, except for the tolerance.
search = attrgetter(
    "experiment.mode", "experiment.order", "experiment.holdout", "calibration_images", "experiment.validation"
)


def without_variants(records: Iterable[Record]) -> list[Record]:
    """Return the base records of all seeds."""
    return [record for record in records if not variant(record)]


def base_records(records: Iterable[Record]) -> list[Record]:
    """Return the base record of each network and data set, with the lowest seed."""
    return lowest_seeds(without_variants(records))


def lowest_seeds(records: Iterable[Record]) -> list[Record]:
    """Return one record per experiment, that of its lowest seed, in the order of the records."""
    lowest: dict[tuple, Record] = {}
    for record in records:
        key = (*place(record), variant(record))
        if key not in lowest or seed(record) < seed(lowest[key]):
            lowest[key] = record
    return list(lowest.values())


def differing_in_seed(records: Iterable[Record]) -> Groups:
    """Return the base records of each network that was trained from several seeds, the lowest seed first."""
    return [sorted(group, key=seed) for group in grouped_by(without_variants(records), place)]


def differing_in_size(records: Iterable[Record]) -> Groups:
    """Return the networks of one family on one data set, for example VGG11 and VGG19 on CIFAR-10."""
    return grouped_by(base_records(records), lambda one: (one.experiment.dataset, family_of(one.experiment.network)))


def differing_in_dataset(records: Iterable[Record]) -> Groups:
    """Return one network on several data sets."""
    return grouped_by(base_records(records), attrgetter("experiment.network"))


def differing_in_weights(records: Iterable[Record]) -> Groups:
    """Return one network on one data set, trained from scratch and from other weights, searched alike."""
    return with_lowest_seed(grouped_by(with_variants(records, from_other_weights), place_and_seed))


def differing_in_tolerance(records: Iterable[Record]) -> Groups:
    """Return one trained network searched at several tolerances, the strictest first."""
    return beside_base(records, at_another_tolerance, tolerance)


def differing_in_search(records: Iterable[Record]) -> Groups:
    """Return one trained network searched in several ways at one tolerance, the default search first."""
    groups = grouped_by(records, attrgetter("weights", "experiment.tolerance"))
    ordered = [first_of_each(sorted(group, key=unusual), search) for group in groups]
    return with_lowest_seed([searches for searches in ordered if len(searches) > 1])


def differing_in_finetuning(records: Iterable[Record]) -> Groups:
    """Return one split network fine-tuned by several recipes, the fewest epochs first."""
    return beside_base(records, finetuned_otherwise, finetuning_epochs)


def differing_in_training(records: Iterable[Record]) -> Groups:
    """Return one network trained from scratch by several recipes and searched alike, the fewest epochs first."""
    return beside_base(records, trained_otherwise, training_epochs)


def beside_base(records: Iterable[Record], belongs: Callable, order: Callable[[Record], float]) -> Groups:
    """Return the base record of the lowest seed with its variants that `belongs` chooses, in order."""
    groups = grouped_by(with_variants(records, belongs), place_and_seed)
    return with_lowest_seed([sorted(group, key=order) for group in groups])


def figure2_panels(records: Sequence[Record]) -> dict[str, Groups]:
    """Return the groups that the panels of Figure 2 compare, by title."""
    return {
        "one family, one data set": differing_in_size(records),
        "one network, two data sets": differing_in_dataset(records),
        "one network, trained in several ways": differing_in_weights(records),
    }


def in_no_panel(records: Sequence[Record]) -> list[Record]:
    """Return the base records that no panel of Figure 2 shows."""
    shown = [record for groups in figure2_panels(records).values() for group in groups for record in group]
    return [record for record in base_records(records) if record not in shown]


def grouped_by(records: Iterable[Record], key: Callable[[Record], object]) -> Groups:
    """Return the sets of two or more records that agree in `key`."""
    groups: dict[object, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return [group for group in groups.values() if len(group) > 1]


def first_of_each(records: Iterable[Record], key: Callable[[Record], object]) -> list[Record]:
    """Return the first record for each value of `key`."""
    first: dict[object, Record] = {}
    for record in records:
        first.setdefault(key(record), record)
    return list(first.values())


def with_lowest_seed(groups: Groups) -> Groups:
    """Return the groups without those that repeat another group from a higher seed."""
    chosen = lowest_seeds(group[0] for group in groups)
    return [group for group in groups if group[0] in chosen]


def with_variants(records: Iterable[Record], belongs: Callable[[Record, Record], bool]) -> list[Record]:
    """Return the base records, and the variants for which `belongs(variant, base record)` holds."""
    records = list(records)
    bases = {place_and_seed(one): one for one in without_variants(records)}
    pairs = [(one, bases.get(place_and_seed(one))) for one in records]
    return [one for one, base in pairs if base and (one is base or variant(one) and belongs(one, base))]


def from_other_weights(one: Record, base: Record) -> bool:
    return origin(one) != origin(base) and searched_alike(one, base)


def at_another_tolerance(one: Record, base: Record) -> bool:
    return one.weights == base.weights and search(one) == search(base) and tolerance(one) != tolerance(base)


def finetuned_otherwise(one: Record, base: Record) -> bool:
    same_split = one.weights == base.weights and ranks_of(one) == ranks_of(base)
    recipes_differ = result_fields(one.experiment.finetune) != result_fields(base.experiment.finetune)
    return same_split and recipes_differ and one.finetuned


def trained_otherwise(one: Record, base: Record) -> bool:
    from_scratch = origin(one) == origin(base) == (None, None)
    recipes_differ = result_fields(one.experiment.train) != result_fields(base.experiment.train)
    return from_scratch and recipes_differ and one.weights != base.weights and searched_alike(one, base)


def searched_alike(one: Record, other: Record) -> bool:
    """Whether networks of one width were searched in the same way."""
    settings = [(search(record), tolerance(record), record.experiment.width) for record in (one, other)]
    return settings[0] == settings[1]


def ranks_of(record: Record) -> list[int]:
    return [entry.rank for entry in record.plan.layers]


def origin(record: Record) -> tuple[str | None, str | None]:
    """Return what training started from: another experiment's weights, and the tag of published weights."""
    taken_as_it_is = training_epochs(record) == 0  # then the experiment that it starts from was trained in its place
    return None if taken_as_it_is else record.experiment.start, record.experiment.pretrained


def unusual(record: Record) -> tuple[bool, bool]:
    """Sort the default search (joint, forward, on test images) first, and of several the base record."""
    chosen = record.experiment
    return (chosen.mode, chosen.order, chosen.holdout) != ("joint", "forward", 0), variant(record) != ""


def family_of(network: str) -> str:
    """Return a network's name without its size.

    >>> family_of("vgg19")
    'vgg'
    """
    return network.rstrip("0123456789")


def label(record: Record, among: Iterable[Record]) -> str:
    """Return the settings in which a record differs from those it is shown with; its network if it is alone."""
    this, among = record.experiment, list(among)
    others = [other.experiment for other in among]
    words = [this.network] if any(other.network != this.network for other in others) else []
    words += [this.dataset] if any(other.dataset != this.dataset for other in others) else []
    words += [f"$\\epsilon$ = {this.tolerance:g}"] if any(other.tolerance != this.tolerance for other in others) else []
    twins = [other for other in among if place(other) == place(record) and other.weights != record.weights]
    words += [origin_label(this.variant)] if any(variant(other) != this.variant for other in twins) else []
    words += [f"seed {this.seed}"] if any(seed(other) != this.seed for other in twins) else []
    words += [] if words or len(among) == 1 else [search_label(record, among)]
    return ", ".join(words) or this.network


def search_label(record: Record, among: Sequence[Record]) -> str:
    """Return how a network was searched, as far as that differs from the first of `among`."""
    this = record.experiment
    words = [
        "each layer by itself" if this.mode == "isolated" else "jointly",
        this.order,
        f"on {this.holdout:,} held-out images" if this.holdout else "on test images",
        f"with {record.calibration_images:,} calibration images",
        f"with {this.validation or 'all'} validation images",
    ]
    differing = [word for word, own, first in zip(words, search(record), search(among[0])) if own != first]
    # A network trained without some images is not the one that other pages show, so its first search is named.
    usual = words[2] if any(one.experiment.holdout for one in among) else "default"
    return ", ".join(differing) or usual


def origin_label(variant: str) -> str:
    """Return the words for a variant that says how a network came to its weights."""
    return variant.replace("-", " ") or "from scratch"
