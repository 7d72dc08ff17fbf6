"""Compare the search of a pretrained network with naive passes, which would take hours for all of its probes.

    python -m benchmarks.pretrained deit_tiny_patch16_224 --images DIR --weights FILE

One naive pass, timed in the same process, stands for each probe of the naive search. Every tenth layer is searched
naively as well, in the network with the projections that `search_ranks` left in the layers before it.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import urank
from benchmarks import naive
from benchmarks.speed import OUT, measured, measured_here, rows_in, same_plan
from urank.cli_measure import Images
from urank.factorize import project_layer
from urank.files import write_json
from urank.layers import matrix_layers
from urank.measure import choose_layers, measurable
from urank.models.loading import load_network, preprocessing_of

Batches = list[tuple[Tensor, Tensor]]


def timed_search(network: nn.Module, grams: dict[str, Tensor], batches: Batches, tolerance: float) -> tuple:
    """Return the plan and a row of its time beside that of naive passes, before and after it."""
    passes = [measured(lambda: naive.count(network, batches)).seconds for _ in range(2)]
    ours = measured(lambda: urank.search_ranks(network, grams, batches, tolerance))
    passes += [measured(lambda: naive.count(network, batches)).seconds for _ in range(2)]
    plan, probes, one_pass = ours.result, len(ours.result.probes), median(passes)
    times = dict(seconds=round(ours.seconds, 1), pass_seconds=round(one_pass, 1), peak_mib=ours.peak >> 20)
    times |= dict(naive_seconds=round(one_pass * probes), ratio=round(one_pass * probes / ours.seconds, 2))
    return plan, dict(images=plan.total, layers=len(grams), probes=probes, mlu=round(100 * plan.mlu, 1), **times)


def searched_naively(
    network: nn.Module, grams: dict[str, Tensor], batches: Batches, plan: urank.RankPlan, every: int
) -> Iterator[tuple[str, bool]]:
    """Yield every `every`-th layer, and whether the naive search makes the same decisions and finds the same ranks."""
    network = copy.deepcopy(network)
    layers = matrix_layers(network)
    for number, (name, entry) in enumerate(zip(grams, plan.layers, strict=True)):
        if number % every == 0:
            other = naive.search(network, {name: grams[name]}, batches, plan.tolerance)
            asked = tuple(probe for probe in plan.probes if probe.layer == name)
            yield name, same_plan(replace(plan, layers=(entry,), probes=asked), other)
        project_layer(layers[name], grams[name], entry.k_s, entry.k_t)


def main(
    model: Annotated[str, typer.Argument(help="A timm or torchvision network.")],
    images: Annotated[Path, typer.Option(help="Folder of images, as for urank measure.")],
    weights: Annotated[Path | None, typer.Option(help="File of weights.")] = None,
    calibration: Annotated[int, typer.Option(help="Number of calibration images.")] = 500,
    validation: Annotated[int | None, typer.Option(help="Number of validation images; default: all others.")] = None,
    tolerance: Annotated[float, typer.Option(help="Accuracy points that one projection may cost.")] = 0.1,
    every: Annotated[int, typer.Option(help="Search each layer of this distance naively, too.")] = 10,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = OUT,
) -> None:
    """Time the search, compare it with naive passes and some naive searches, and add a row to the results."""
    urank.keep_freed_memory()  # as the command does
    network = load_network(model, weights)
    data = Images(images, network, preprocessing_of(model, network), False, calibration, validation, False)
    calibrated = list(data.calibration)
    network = measurable(network, calibrated[0][0]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    grams = urank.accumulate_grams(network, calibrated, choose_layers(network, calibrated[0][0][:1], ["*"]))
    batches = list(data.validation)
    plan, row = timed_search(network, grams, batches, tolerance)
    row = measured_here("pretrained") | dict(part="pretrained", what=model) | row
    typer.echo(row)
    compared = dict(searched_naively(network, grams, batches, plan, every))
    typer.echo(compared)
    row |= dict(compared=len(compared), same=all(compared.values()))
    others = [one for one in rows_in(out) if (one["only"], one["what"]) != ("pretrained", model)]
    write_json(out, dict(rows=[*others, row]))


if __name__ == "__main__":
    typer.run(main)
