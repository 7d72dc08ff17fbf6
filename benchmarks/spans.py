"""How far F(XW) leaves the span of W in the feed-forward networks of the ViTs that are trained on CIFAR-10.

    urank reproduce --profile cifar-cpu --only "cifar10/vit*@small" --seeds 0,1,2
    python -m benchmarks.spans

A row of the CSV is one block of one trained network: the share of ||F(XW)||^2 outside the span of W, in percent, for
each F, over all tokens of 1,000 test images. Networks that are already there are skipped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

import urank
from benchmarks.rows import Table
from urank.layers import evaluating
from urank.reproduction import profiles
from urank.reproduction.experiment import Experiment, load_images
from urank.reproduction.run_folder import original_network

OUT = Path(__file__).parents[1] / "data" / "benchmarks" / "spans.csv"
FUNCTIONS = {"identity": nn.Identity(), "ReLU": nn.ReLU(), "GELU": nn.GELU()}
IMAGES = 1000


def inner_rows(network: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return X W (tokens, m) of the first matrix of each feed-forward network, without its bias, and W (d, m)."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Linear, _: tuple, outputs: Tensor) -> None:
        found.append(((outputs - layer.bias).flatten(0, 1), layer.weight.detach().T))

    handles = [block.mlp.fc1.register_forward_hook(keep) for block in network.blocks]
    with evaluating(network):
        network(images)
    for handle in handles:
        handle.remove()
    return found


def rows_of(experiment: Experiment, folder: Path) -> Iterator[dict]:
    """Yield a row for each block of a trained network."""
    data = load_images(experiment)
    images, _ = next(iter(data.batches(data.test.take(IMAGES), IMAGES)))
    for block, (rows, W) in enumerate(inner_rows(original_network(experiment, folder), images), 1):
        shares = {name: round(100 * urank.share_outside_span(F(rows), W), 2) for name, F in FUNCTIONS.items()}
        yield dict(network=experiment.network, seed=experiment.seed, block=block) | shares


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, separated by commas.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="CSV file of the results.")] = OUT,
) -> None:
    """Measure the finished runs of both twins and write a row for each block."""
    profile = profiles.load_profile("cifar-cpu")
    names = profile.names(["cifar10/vit*@small"], [int(seed) for seed in seeds.split(",")])
    table = Table(out, "network", "seed", "block")
    for experiment in map(profile.find, names):
        if not table.has(experiment.network, experiment.seed, 1):
            for row in rows_of(experiment, profiles.folder_of("cifar-cpu", experiment.name)):
                table.add(row)


if __name__ == "__main__":
    typer.run(main)
