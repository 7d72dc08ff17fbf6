"""List for every architecture of timm which share of its parameters can be measured, and why the rest cannot.

    python -m benchmarks.timm_coverage coverage.csv              # all of them, a few minutes
    python -m benchmarks.timm_coverage coverage.csv "vit_*" --forward

Networks are built on the meta device, without numbers. Each one is a row of the CSV, which is written at once; a second
call with the same file resumes. If an architecture fails, its row contains the error message.
"""

import urank  # noqa: F401, I001  must precede the first import of timm

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import timm
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from urank.attention import explicit_attention
from urank.layers import count_params, coverage
from urank.reproduction.coverage_tables import summarize

COLUMNS = [
    "name",
    "family",  # the module of timm that defines it
    "params",
    "measured_layers",
    "measured_share",  # of the parameters, in measured layers, their biases included
    "skipped",  # "reason: share of the parameters; ..."
    "error",
]


def examine(name: str, forward: bool) -> dict:
    """Return the row of one architecture; if it fails, only its name, family and `error`."""
    row = dict(name=name, family=timm.models.model_entrypoint(name).__module__.rpartition(".")[2])
    try:
        with torch.device("meta"):
            model = explicit_attention(timm.create_model(name))
        size = model.pretrained_cfg["input_size"]
        row |= describe(model, torch.zeros(1, *size, device="meta") if forward else None)
    except Exception as error:  # the row reports it, whatever it is
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return row


def describe(model: nn.Module, images: Tensor | None) -> dict:
    """Return the columns that follow from the `coverage` of a network."""
    frame = coverage(model, images)
    reasons = frame["reason"].str.replace(r" \(.*?\)", "", regex=True)  # without details of single layers
    skipped = frame["share"].groupby(reasons[~frame["measured"]]).sum().sort_values(ascending=False)
    skipped["norms and lone biases"] = 1 - frame["share"].sum()
    return dict(
        params=count_params(model),
        measured_layers=int(frame["measured"].sum()),
        measured_share=round(frame["share"][frame["measured"]].sum(), 4),
        skipped="; ".join(f"{reason}: {share:.4f}" for reason, share in skipped.items()),
    )


def walk(names: Iterable[str], path: Path, forward: bool) -> Iterator[dict]:
    """Examine the architectures and append each row to `path` at once."""
    begun = path.exists()
    with path.open("a", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not begun:
            writer.writeheader()
        for name in names:
            row = examine(name, forward)
            writer.writerow(row)
            yield row


def main(
    path: Annotated[Path, typer.Argument(help="The CSV to write or to complete.")],
    patterns: Annotated[list[str] | None, typer.Argument(help="Names, with wildcards; default: all of timm.")] = None,
    forward: Annotated[
        bool, typer.Option(help="Also run a forward pass on the meta device to find unused layers.")
    ] = False,
) -> None:
    """Build architectures of timm on the meta device and write which share of each can be measured."""
    done = set(pd.read_csv(path)["name"]) if path.exists() else set()
    names = [name for name in timm.list_models(patterns or "") if name not in done]
    for row in (bar := tqdm(walk(names, path, forward), total=len(names), unit="network", file=sys.stderr)):
        bar.set_postfix_str(row["name"])
    print(summarize(pd.read_csv(path)))


if __name__ == "__main__":
    typer.run(main)
