"""How often `evaluation="fast"` decides otherwise than `evaluation="exact"`, over many small trained networks.

    python -m benchmarks.exact_and_fast                        # about half an hour on two cores
    python -m benchmarks.exact_and_fast --only vgg11 --seeds 8

Each network is searched at every tolerance and in both modes, by both evaluations. Each pair of searches is one row of
the CSV, written when it is done. A second call skips the rows that are there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import pandas as pd
import torch
import typer
from torch import nn
from tqdm import tqdm

import urank
from benchmarks.rows import Table
from urank import datasets
from urank.numerics import describe
from urank.plan import RankPlan
from urank.search.probes import FastCounter, WrongSkip

OUT = Path(__file__).parents[1] / "data" / "benchmarks" / "exact_and_fast.csv"
SEEDS, TOLERANCES, MODES = range(4), (0.2, 1.0), ("joint", "isolated")
CALIBRATION_IMAGES = 1000


@dataclass(frozen=True)
class Setting:
    """A small network, how it is trained on digits, and the number of validation images."""

    width: float
    images: int
    recipe: urank.Recipe
    plain: bool = False
    dataset: str = "digits10"


CONVOLUTIONAL = urank.Recipe(epochs=6, batch_size=64, lr=0.05, crop=2, flip=False)
TRANSFORMER = urank.Recipe(epochs=6, batch_size=25, optimizer="adamw", lr=0.001, weight_decay=0.05, crop=1, flip=False)
SETTINGS = {
    "vgg11": Setting(0.25, 1000, CONVOLUTIONAL),
    "vgg13": Setting(0.25, 1000, CONVOLUTIONAL),
    "resnet18": Setting(0.125, 500, CONVOLUTIONAL),
    "vit": Setting(0.17, 200, TRANSFORMER, plain=True),
}


def trained(network: str, seed: int, setting: Setting) -> tuple[nn.Module, datasets.Dataset]:
    digits = datasets.load(setting.dataset, train=5000, test=setting.images, plain=setting.plain)
    torch.manual_seed(seed)
    model = urank.create(network, datasets.CLASSES[setting.dataset], setting.width)
    urank.fit(model, digits, setting.recipe, seed=seed, progress=False)
    return urank.explicit_attention(model).eval(), digits


def compare(model: nn.Module, digits: datasets.Dataset, tolerance: float, mode: str) -> dict:
    """Search `model` by both evaluations and count the differences."""
    grams = urank.accumulate_grams(model, digits.batches(digits.train.take(CALIBRATION_IMAGES)), progress=False)
    batches = list(digits.batches(digits.test))
    with wrong_skips() as skips:
        exact, fast = (
            urank.search_ranks(model, grams, batches, tolerance, mode, evaluation=evaluation, progress=False)
            for evaluation in ("exact", "fast")
        )
    return dict(
        precision=fast.precision,
        layers=len(exact.layers),
        images=exact.total,
        correct=exact.correct,
        probes=len(exact.probes),
        probes_that_differ=len(decisions(exact) - decisions(fast)),
        ranks_that_differ=sum(one.rank != other.rank for one, other in zip(exact.layers, fast.layers)),
        layers_searched_again=len(skips),
        plans_equal=decisions(exact) == decisions(fast) and exact.layers == fast.layers,
    )


def decisions(plan: RankPlan) -> set[tuple]:
    return {(probe.layer, probe.side, probe.k, probe.passed) for probe in plan.probes}


@contextmanager
def wrong_skips() -> Iterator[list[str]]:
    """Collect an entry for each layer that is searched again because a skipped image was wrong."""
    seen, finish = [], FastCounter.finish_layer

    def noting(counter: FastCounter, correct: int) -> int:
        try:
            return finish(counter, correct)
        except WrongSkip:
            seen.append("layer")
            raise

    with patch.object(FastCounter, "finish_layer", noting):
        yield seen


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SETTINGS)}; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds of each network.")] = len(SEEDS),
    out: Annotated[Path, typer.Option(help="The CSV.")] = OUT,
) -> None:
    """Compare both evaluations and print the totals."""
    table = Table(out, "network", "seed", "tolerance", "mode")
    for network, seed in tqdm(list(product(only or SETTINGS, range(seeds))), unit="network"):
        left = [pair for pair in product(TOLERANCES, MODES) if not table.has(network, seed, *pair)]
        if not left:
            continue
        model, digits = trained(network, seed, SETTINGS[network])
        where = dict(network=network, width=SETTINGS[network].width, seed=seed)
        for tolerance, mode in left:
            row = where | dict(tolerance=tolerance, mode=mode) | compare(model, digits, tolerance, mode)
            table.add(row | dict(version=urank.__version__, device=describe(torch.device("cpu"))))
    frame = pd.read_csv(out)
    typer.echo(frame[["probes", "probes_that_differ", "layers_searched_again"]].sum().to_string())
    typer.echo(f"plans equal: {frame['plans_equal'].sum()} of {len(frame)}")


if __name__ == "__main__":
    typer.run(main)
