"""What tests/test_distributed.py runs alone and on two processes: one result, as JSON, in the folder named.

torchrun --nproc-per-node 2 tests/two_processes.py FOLDER
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import briefly_trained, in_batches, small_cnn, structured_images
from torch import nn

from urank import datasets, distributed
from urank.calibration import accumulate_grams
from urank.files import write_json, write_tensors, write_weights
from urank.search import bisection
from urank.search.bisection import search_ranks
from urank.search.probes import ExactCounter, FastCounter, ScreenedCounter
from urank.search.validation import Validation, evaluate
from urank.training.fitting import fit
from urank.training.recipe import Recipe


def main(folder: Path) -> None:
    distributed.join()
    torch.manual_seed(0)
    network = briefly_trained(small_cnn()).float()
    calibration, validation = structured_images(200, seed=2), structured_images(151, seed=3)
    batches = in_batches(validation[0].float(), validation[1], 25)  # 7 batches; shares of 76 and 75 images
    grams = accumulate_grams(network, in_batches(calibration[0].float(), calibration[1], 64), progress=False)
    write_tensors(folder / "grams.safetensors", grams)
    for name, counter in dict(exact=ExactCounter, fast=FastCounter, screened=ScreenedCounter).items():
        with patch.object(bisection, "counter_for", lambda *_, counter=counter: counter):
            search_ranks(network, grams, batches, 1.0, progress=False).save(folder / f"{name}.json")
    correct = Validation(batches).count_correct(network)
    counted = dict(correct=correct, accuracy=evaluate(network, batches), processes=distributed.processes()[1])
    write_json(folder / "fit.json", fitted(folder) | counted)


def fitted(folder: Path) -> dict:
    """A network without batch norm, whose gradient is the mean over a batch however it is shared."""
    digits = datasets.load("digits10", train=120, test=20)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 10))
    recipe = Recipe(epochs=2, batch_size=20, lr=0.02, crop=2, flip=False, ema_decay=0.9, precision="float32")
    history = fit(network, digits, recipe, checkpoint=folder / "fit.ckpt")
    write_weights(folder / "fit.safetensors", network)
    rows = dict(loss=[row["loss"] for row in history], trained_on=[row["accuracy"] for row in history])
    return rows | dict(alike=alike_with_batch_norm(digits))


def alike_with_batch_norm(digits: datasets.Dataset) -> bool:
    """Whether every process ends with the same statistics, though each normalized its own share of a batch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    fit(network, digits, Recipe(epochs=1, batch_size=20, lr=0.02, crop=2, flip=False))
    mean, count = network[1].running_mean, distributed.processes()[1]
    return torch.equal(distributed.total(mean.clone()), count * mean)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
