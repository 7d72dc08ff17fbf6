"""Is the two-sided projection the right one? Accuracy by the choice of the ranks and of W'.

    URANK_DATA=... python -m benchmarks.choices curves resnet32 --data DIR   # DIR as in `benchmarks.subjects`
    python -m benchmarks.choices half "small vgg11"
    python -m benchmarks.choices noise resnet32 --data DIR

Each command adds rows to a CSV in `data/benchmarks`, one after another, and skips those that are there:

- `curves` (choices.csv): every choice at several sizes, or at the ranks that a search finds at several tolerances.
- `half` (half_searches.csv): a search of both sides beside one of the output side alone.
- `budgets` (budgets.csv): one tolerance per projection beside one total budget.
- `noise` (noise.csv): the search on bootstrap draws of the validation images, and on halves and quarters of them.
- `tuned` (tuned.csv): small networks fine-tuned after each choice, and one as thin trained from scratch.
- `ladders` (ladders.csv): the accuracy at every k of some layers, beside the answer of the bisection.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import urank
from benchmarks.rows import Table
from benchmarks.subjects import SMALL, Subject, load, small
from urank.factorize import planned_layers, project_layer
from urank.layers import matrix_layers, set_weight_matrix, weight_matrix
from urank.measure import split_network
from urank.models.vgg import initialize
from urank.numerics import describe
from urank.reproduction.profiles import runs_folder
from urank.subspaces import layer_spectra, project_weight

FOLDER = Path(__file__).parents[1] / "data" / "benchmarks"
TOLERANCES = (0.1, 0.5, 0.05, 0.2)
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
RULES: tuple[dict[str, float], ...] = (dict(tolerance=0.1), dict(budget=2.0), dict(tolerance=0.5), dict(budget=5.0))
DRAWS = 5
PARTS = (2, 4)

app = typer.Typer(pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(help='A name from `benchmarks.subjects`, or "small NETWORK".')]
Data = Annotated[Path, typer.Option(help="Folder with cifar_resnets/ and imagenet/.")]
DATA = Path("data")


def search(subject: Subject, images: str = "all", **options: object) -> urank.RankPlan:
    """Search the ranks; a finished or interrupted search of the same options and images is taken up again."""
    chosen = "-".join(f"{name}-{value}" for name, value in (options | dict(images=images)).items())
    checkpoint = runs_folder() / "choices" / subject.name.replace("/", "-") / f"{chosen}.json"
    arguments: dict = options | dict(checkpoint=checkpoint)
    return urank.search_ranks(subject.network, subject.grams, subject.validation, **arguments)


def share_kept(subject: Subject, network: nn.Module) -> float:
    """Return the parameters of a network as a share of those of the unmodified one."""
    return urank.count_cost(network, subject.shape).params / urank.count_cost(subject.network, subject.shape).params


def accuracy(subject: Subject, network: nn.Module) -> float:
    return 100 * subject.validation.count_correct(network) / subject.validation.total


def built(subject: Subject, plan: urank.RankPlan) -> nn.Module:
    """Return the compact network of a plan with the paper's factors, not fine-tuned."""
    return split_network(subject.network, plan, subject.grams, "paper")


def uniform(subject: Subject, share: float) -> urank.RankPlan:
    """Return the plan that leaves every layer the same share of its weights, for the directions of its outputs."""
    keep = share_of_layers(subject, share)
    whole = urank.allocate_ranks(subject.network, subject.grams, 1.0, image_shape=subject.shape)
    ranks = [max(1, floor(keep * entry.d * entry.m / (entry.d + entry.m))) for entry in whole.layers]
    entries = [replace(entry, rank=rank, k_t=rank) for entry, rank in zip(whole.layers, ranks)]
    return replace(whole, layers=tuple(entries), mode=f"uniform({keep:.3f})")


def share_of_layers(subject: Subject, share: float) -> float:
    """Return which share of the measured layers' weights is left in a network with `share` of its parameters."""
    total = urank.count_cost(subject.network, subject.shape).params
    layers = matrix_layers(subject.network)
    measured = sum(layers[name].weight.numel() for name in subject.grams)
    return 1 - (1 - share) * total / measured


def in_random_subspaces(subject: Subject, plan: urank.RankPlan, seed: int) -> nn.Module:
    """Return the network with W' = W Q Q^T, where Q spans a random subspace of the outputs of the plan's rank."""
    network = built(subject, urank.weight_svd(subject.network, plan))  # for its structure
    generator = torch.Generator().manual_seed(seed)
    for entry, layer in planned_layers(subject.network, plan):
        W = weight_matrix(layer)
        Q, _ = torch.linalg.qr(torch.randn(entry.m, entry.rank, generator=generator, dtype=W.dtype))
        first, second = network.get_submodule(entry.layer).pair
        set_weight_matrix(first, W @ Q)
        set_weight_matrix(second, Q.T)
    return network


@app.command()
def curves(
    name: Name,
    data: Data = DATA,
    plan: Annotated[Path | None, typer.Option(help="Plan of an earlier search, in place of new ones.")] = None,
    tolerance: Annotated[list[float] | None, typer.Option(help="Only at this tolerance. Repeatable.")] = None,
) -> None:
    """Compare the choices without a search at several sizes, and all of them at what searches find."""
    table = Table(FOLDER / "choices.csv", "network", "target", "choice")
    subject = load(name, data)
    original = accuracy(subject, subject.network)

    def add(target: str, choice: str, network: nn.Module, kept: float, mlu: float | None = None) -> None:
        if not table.has(subject.name, target, choice):
            row = dict(network=subject.name, target=target, choice=choice, kept=round(100 * kept, 2))
            row |= dict(accuracy=round(accuracy(subject, network), 2), original=round(original, 2))
            table.add(row | dict(images=subject.validation.total, mlu=mlu, device=device_name()))

    earlier = {} if plan is None else {(saved := urank.RankPlan.load(plan)).tolerance: saved}
    for points in earlier or tolerance or TOLERANCES:
        found = earlier.get(points) or search(subject, tolerance=points)
        size = share_kept(subject, built(subject, found))
        for choice, network in at_ranks(subject, found):
            add(f"tolerance {points:g}", choice, network, size, round(100 * found.mlu, 2))
        for choice, network in by_size(subject, size):
            kept = share_kept(subject, network)
            add(f"tolerance {points:g}", choice, network, kept, round(100 * found.mlu, 2))
    for keep in KEEPS:
        for choice, network in by_size(subject, keep):
            add(f"keep {keep:g}", choice, network, share_kept(subject, network))


def at_ranks(subject: Subject, plan: urank.RankPlan) -> Iterator[tuple[str, nn.Module]]:
    """Yield (choice, network): W' in every layer, not split, and the networks that split useful layers at their ranks.

    Of these, "two-sided" has W' in all layers, as in the paper; all others leave the layers as they are that they do
    not split.
    """
    network, grams, split = subject.network, subject.grams, plan.useful_part()
    yield "projected", urank.project_network(network, plan, grams)
    yield "two-sided", built(subject, plan)
    yield "two-sided, split layers only", built(subject, split)
    yield "output PCA", built(subject, urank.output_pca(network, grams, split))
    yield "SVD of W", built(subject, urank.weight_svd(network, split))
    yield "random", in_random_subspaces(subject, split, seed=0)


def by_size(subject: Subject, share: float) -> Iterator[tuple[str, nn.Module]]:
    """Yield (choice, network with at most this share of the parameters); none of them needs a search."""
    network, grams, shape = subject.network, subject.grams, subject.shape
    yield "energy", built(subject, urank.allocate_ranks(network, grams, share, image_shape=shape))
    of_weights = urank.allocate_ranks(network, grams, share, choice="weights", image_shape=shape)
    yield "energy of W", built(subject, of_weights)
    yield "uniform", built(subject, uniform(subject, share))


@app.command()
def half(name: Name, data: Data = DATA) -> None:
    """Search both sides, and the output side alone; compare ranks, probes and accuracy."""
    table = Table(FOLDER / "half_searches.csv", "network")
    subject = load(name, data)
    if table.has(subject.name):
        return
    both, output = search(subject, tolerance=0.1), search(subject, tolerance=0.1, sides="output")
    row = dict(network=subject.name, layers=len(both.layers), images=both.total)
    row["rank is k_T"] = sum(entry.rank == entry.k_t for entry in both.layers)
    row["equal ranks"] = sum(one.rank == other.rank for one, other in zip(both.layers, output.layers))
    for label, plan in (("both", both), ("output", output)):
        row[f"probes {label}"], row[f"mlu {label}"] = len(plan.probes), round(100 * plan.mlu, 2)
        compact = built(subject, plan)
        row[f"accuracy {label}"] = round(accuracy(subject, compact), 2)
        row[f"kept {label}"] = round(100 * share_kept(subject, compact), 2)
    table.add(row | dict(original=round(accuracy(subject, subject.network), 2), device=device_name()))


@app.command()
def budgets(name: Name, data: Data = DATA) -> None:
    """Search with one tolerance per projection and with one total budget."""
    table = Table(FOLDER / "budgets.csv", "network", "rule")
    subject = load(name, data)
    original = round(accuracy(subject, subject.network), 2)
    for options in RULES:
        [(kind, points)] = options.items()
        if not table.has(subject.name, rule := f"{kind} {points:g}"):
            plan = search(subject, **options)
            row = dict(network=subject.name, rule=rule, layers=len(plan.layers), mlu=round(100 * plan.mlu, 2))
            projected = urank.project_network(subject.network, plan, subject.grams)
            row |= dict(projected=round(accuracy(subject, projected), 2), original=original)
            table.add(row | dict(images=plan.total, device=device_name()))


@app.command()
def noise(name: Name, data: Data = DATA, tolerance: float = 0.1) -> None:
    """Search on bootstrap draws of the validation images, and on parts of them, scored on the images left out."""
    table = Table(FOLDER / "noise.csv", "network", "images drawn")
    subject = load(name, data)
    for drawn, chosen, others in draws(subject.validation):
        if not table.has(subject.name, drawn):
            plan = search(replace(subject, validation=chosen), drawn, tolerance=tolerance)
            projected = urank.project_network(subject.network, plan, subject.grams)
            row = {"network": subject.name, "images drawn": drawn, "tolerance": tolerance, "images": plan.total}
            row |= dict(mlu=round(100 * plan.mlu, 2), ranks=" ".join(str(entry.rank) for entry in plan.layers))
            for label, images in (("searched", chosen), ("other", others)):
                if images is not None:
                    counts = [images.count_correct(network) for network in (subject.network, projected)]
                    row[f"lost on {label}"] = round(100 * (counts[0] - counts[1]) / images.total, 2)
            table.add(row | dict(device=device_name()))


def draws(
    validation: urank.Validation,
) -> Iterator[tuple[str, urank.Validation, urank.Validation | None]]:
    """Yield (name, images to search on, images left out): all, bootstrap draws, then every half and quarter."""
    batches = list(validation)
    images, labels = (torch.cat(parts) for parts in zip(*batches))

    def part(rows: Tensor) -> urank.Validation:
        return urank.Validation(list(zip(images[rows].split(250), labels[rows].split(250))))

    yield "all", validation, None
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        yield f"bootstrap {seed}", part(torch.randint(len(labels), (len(labels),), generator=generator)), None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for count in PARTS:
        chunks = order.chunk(count)
        for number, rows in enumerate(chunks):
            others = torch.cat([*chunks[:number], *chunks[number + 1 :]])
            yield f"part {number + 1} of {count}", part(rows), part(others)


@app.command()
def ladders(name: Name, data: Data = DATA, tolerance: float = 0.1, count: int = 4) -> None:
    """Count correct images at every k_T of some layers, in the network that the search has left before them."""
    table = Table(FOLDER / "ladders.csv", "network", "layer", "k")
    subject = load(name, data)
    plan = search(subject, tolerance=tolerance)
    chosen = {round(place) for place in torch.linspace(0, len(plan.layers) - 1, count).tolist()}
    network = urank.project_network(subject.network, replace(plan, layers=()), subject.grams)
    layers, replay = matrix_layers(network), urank.Replay(network, subject.validation)
    for number, found in enumerate(plan.layers):
        layer, gram = layers[found.layer], subject.grams[found.layer]
        if number in chosen:
            replay.advance(layer)
            W = weight_matrix(layer)
            spectra = layer_spectra(gram, W)
            for k in range(1, found.m + 1):
                if not table.has(subject.name, found.layer, k):
                    set_weight_matrix(layer, project_weight(W, *spectra, found.k_s, k))
                    correct = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in replay)
                    row = dict(network=subject.name, layer=found.layer, k=k, correct=correct, found=found.k_t)
                    table.add(row | dict(images=plan.total, tolerance=tolerance))
            set_weight_matrix(layer, W)
        project_layer(layer, gram, found.k_s, found.k_t)


@app.command()
def tuned(name: Name, seeds: int = 3, tolerance: float = 0.5) -> None:
    """Fine-tune the compact networks of several choices, the full network, and a network as thin from scratch."""
    table = Table(FOLDER / "tuned.csv", "network", "seed", "choice")
    architecture = name.removeprefix("small ")
    recipe = SMALL[architecture].recipe
    short = replace(recipe, epochs=2, lr=recipe.lr / 5)
    for seed in range(seeds):
        subject = small(architecture, seed)
        plan = search(subject, tolerance=tolerance)
        for choice, network in starts(subject, plan, seed):
            if table.has(name, seed, choice):
                continue
            row = dict(network=name, seed=seed, choice=choice, before=accuracy(subject, network))
            epochs = replace(recipe, epochs=recipe.epochs + short.epochs) if choice == "from scratch" else short
            urank.fit(network, subject.data, epochs, seed=seed, progress=False)
            row |= dict(after=accuracy(subject, network.eval()), kept=round(100 * share_kept(subject, network), 2))
            row |= dict(original=accuracy(subject, subject.network), images=plan.total)
            table.add(row | dict(device=device_name()))


def starts(subject: Subject, plan: urank.RankPlan, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield (choice, network to fine-tune); the last one has random weights."""
    network, grams = subject.network, subject.grams
    size = share_kept(subject, built(subject, plan))
    energy = urank.allocate_ranks(network, grams, size, image_shape=subject.shape)
    plans = {"two-sided": plan, "output PCA": urank.output_pca(network, grams, plan.useful_part()), "energy": energy}
    yield "full rank", copy.deepcopy(network)
    for choice, chosen in plans.items():
        projected = urank.project_network(network, chosen, grams)
        yield choice, urank.decompose(projected, chosen, useful_only=True)
        yield f"{choice}, balanced", urank.decompose(projected, chosen, useful_only=True, balanced=True)
    torch.manual_seed(seed)
    yield "from scratch", built(subject, plan).apply(reset).apply(initialize)


def reset(module: nn.Module) -> None:
    """Give a layer, also a normalization, the weights and statistics of a new one."""
    if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
        module.reset_parameters()


def device_name() -> str:
    return describe(torch.device("cpu"))


if __name__ == "__main__":
    urank.keep_freed_memory()
    app()
