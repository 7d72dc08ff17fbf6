"""How much of every architecture of timm is measured, and why the rest is not.

    python -m benchmarks.timm_coverage coverage.csv              # all of them, a few minutes
    python -m benchmarks.timm_coverage coverage.csv "vit_*" --forward

Networks are built on the meta device: shapes without numbers. Each gets one row of the CSV, written when it is done; a
second call with the same file goes on where the first stopped. An architecture that fails has the message in its row.
"""

import urank  # noqa: F401, I001  must precede the first import of timm

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import timm
import torch
import typer
from torch import nn
from tqdm import tqdm

from urank.layers import evaluating, matrix_layers, skipped_layers

COLUMNS = [
    "name",
    "family",  # the module of timm that defines it
    "params",
    "measured_layers",
    "measured_params_share",
    "skipped",  # "reason: share of the parameters; ..."
    "called_layers",  # measured layers that one forward pass calls exactly once, as the measurement needs it
    "called_params_share",
    "uncalled",  # the other measured layers, "path: calls; ..."
    "error",
]
VECTOR = "vector: a bias, norm or scale"


def parts(model: nn.Module) -> list[tuple[str, int, str | None]]:
    """(path, number of parameters, why it is not measured or None) for each parameter of `model`."""
    measured, skipped = matrix_layers(model), skipped_layers(model)
    rows = []
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        if owner in measured and leaf == "weight":
            reason = None
        elif parameter.ndim < 2:
            reason = VECTOR
        else:
            reason = skipped.get(owner, f"parameter of {type(model.get_submodule(owner)).__name__} itself")
        rows.append((path, parameter.numel(), reason))
    return rows


def describe(model: nn.Module) -> dict:
    """The columns that the shapes of `model` decide."""
    rows = parts(model)
    params = sum(size for _, size, _ in rows)
    skipped: Counter[str] = Counter()
    for _, size, reason in rows:
        if reason is not None:
            skipped[re.sub(r" \(.*?\)", "", reason)] += size  # without the details that differ from layer to layer
    return dict(
        params=params,
        measured_layers=sum(reason is None for *_, reason in rows),
        measured_params_share=round(1 - sum(skipped.values()) / params, 4),
        skipped="; ".join(f"{reason}: {size / params:.4f}" for reason, size in skipped.most_common()),
    )


def describe_calls(model: nn.Module) -> dict:
    """The columns that one forward pass at the network's default image size decides."""
    rows = [(path, size) for path, size, reason in parts(model) if reason is None]
    layers = {path: model.get_submodule(path.removesuffix(".weight")) for path, _ in rows}
    calls: Counter[nn.Module] = Counter()
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda layer, _: calls.update([layer]))
    with evaluating(model):
        model(torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta"))
    times = {path: calls[layer] for path, layer in layers.items()}
    once = [size for path, size in rows if times[path] == 1]
    return dict(
        called_layers=len(once),
        called_params_share=round(sum(once) / sum(parameter.numel() for parameter in model.parameters()), 4),
        uncalled="; ".join(f"{path}: {count}" for path, count in times.items() if count != 1),
    )


def examine(name: str, forward: bool) -> dict:
    """The row of one architecture; what fails leaves its columns empty and its message in `error`."""
    row = dict(name=name, family=timm.models.model_entrypoint(name).__module__.rpartition(".")[2])
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        row |= describe(model)
        if forward:
            row |= describe_calls(model)
    except Exception as error:  # whatever an architecture does, the walk is to report it and go on
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return row


def walk(names: Iterable[str], path: Path, forward: bool) -> Iterator[dict]:
    """Examine `names` and append each row to `path` at once."""
    begun = path.exists()
    with path.open("a", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not begun:
            writer.writeheader()
        for name in names:
            row = examine(name, forward)
            writer.writerow(row)
            yield row


def summarize(frame: pd.DataFrame) -> str:
    """What the whole file says, in a few lines."""
    share = frame["measured_params_share"]
    families = frame.groupby("family")["measured_params_share"].agg(["mean", "size"]).sort_values("mean")
    lines = [
        f"{len(frame)} architectures, {frame['error'].isna().sum()} came through without an error",
        f"{(share >= 0.95).sum()} with at least 95 % of the parameters in measured layers; median {share.median():.1%}",
        "least measured families:",
        *(f"  {family:<24} {mean:6.1%} of {size:.0f}" for family, mean, size in families.head(12).itertuples()),
        "most parameters left out for:",
        *(f"  {total:7.2f} networks' worth  {reason}" for reason, total in reasons(frame).most_common(8)),
    ]
    if frame["called_params_share"].notna().any():
        called = frame["called_params_share"]
        lines.append(f"{(called >= 0.95).sum()} with at least 95 % in measured layers that run once in a forward pass")
    return "\n".join(lines)


def reasons(frame: pd.DataFrame) -> Counter[str]:
    """The shares of each reason in `skipped`, summed over the networks."""
    total: Counter[str] = Counter()
    for cell in frame["skipped"].dropna():
        for entry in cell.split("; "):
            reason, _, share = entry.rpartition(": ")
            total[reason] += float(share)
    return total


def main(
    path: Annotated[Path, typer.Argument(help="The CSV to write, or to go on with.")],
    patterns: Annotated[list[str] | None, typer.Argument(help="Names, with wildcards; default is all of timm.")] = None,
    forward: Annotated[bool, typer.Option(help="Also run a forward pass of shapes, to see what it calls.")] = False,
) -> None:
    """Build every architecture of timm without numbers and write what of it is measured."""
    done = set(pd.read_csv(path)["name"]) if path.exists() else set()
    names = [name for name in timm.list_models(patterns or "") if name not in done]
    for row in (bar := tqdm(walk(names, path, forward), total=len(names), unit="network", file=sys.stderr)):
        bar.set_postfix_str(row["name"])
    print(summarize(pd.read_csv(path)))


if __name__ == "__main__":
    typer.run(main)
