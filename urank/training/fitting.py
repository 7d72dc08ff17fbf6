"""Fit a network, fine-tune it, and count what it gets right.

The order of the images and the augmentation of epoch e are drawn from (seed, e) alone, so a run that was killed and
resumed sees what an uninterrupted run would have seen; on a processor `fit` is deterministic given its seed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from math import inf
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from tqdm import tqdm

from urank.datasets import Dataset, FileSplit, Split
from urank.deadline import OutOfTime, is_over
from urank.distributed import is_first, processes, synchronize, total
from urank.files import read_checkpoint, write_checkpoint
from urank.numerics import arithmetic, autocast, benchmarked_convolutions, ieee_float32
from urank.training.cuda_graph import Captured
from urank.training.recipe import Recipe, what_is_fitted

UNSAVED = 20.0  # seconds of work that a fit with a checkpoint may lose beside the epoch under way


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    description: str = "training",
    part: str = "",
    deadline: float | None = None,
    progress: bool = True,
) -> list[dict]:
    """Fit `model` in place on `dataset.train` and return a row (epoch, loss, accuracy, seconds, precision) an epoch.

    `loss` and `accuracy` (percent) are those of the augmented training images as they were seen. Several processes
    (see `distributed`) share each batch; batch norm then sees one share at a time.

    Args:
        checkpoint: file from which an interrupted fit goes on. It is rewritten after the first epoch, after the one at
            which the fit stops, and after others where more than `UNSAVED` seconds would be lost without.
        part: path of the module that is fitted, by default the whole network. What is outside it keeps its
            parameters and is in evaluation mode: batch norm keeps its statistics, dropout drops nothing.
        deadline: value of `time.monotonic()` by which to stop: but for the first of this call, no epoch begins that
            would not end before it if it took as long as the last.

    Raises:
        ValueError: fewer training images than one batch, images no larger than the crop's shift, or a checkpoint that
            another recipe or seed wrote.
        FloatingPointError: the loss is no longer finite.
        OutOfTime: the deadline is too near for the epochs that are left.
    """
    if recipe.epochs:
        check_images(dataset, recipe)
    model.to(device, memory_format=torch.channels_last)
    train = dataset.train.feed(device)
    generators = [train.device] if train.device.type == "cuda" else []
    # Every epoch seeds torch's generators, which are the caller's; cuDNN would take TF32 for float32.
    with fitting_only(model, part), torch.random.fork_rng(generators), ieee_float32(), benchmarked_convolutions():
        run = _Run(model, recipe, steps=len(dataset.train) // recipe.batch_size, seed=seed, part=part)
        if checkpoint is not None and checkpoint.exists():
            run.restore(checkpoint)
        for epoch in range(len(run.history), recipe.epochs):
            start = time.perf_counter()
            loss, accuracy = run.epoch(dataset, train, epoch, description, progress)
            seconds, precision = time.perf_counter() - start, arithmetic(train.device, recipe.precision)
            run.history.append(dict(epoch=epoch, loss=loss, accuracy=accuracy, seconds=seconds, precision=precision))
            left = recipe.epochs - epoch - 1
            stops = left > 0 and is_over(deadline, seconds)
            if checkpoint is not None and (run.is_unsaved() or stops or not left):
                run.save(checkpoint)
            if stops:
                raise OutOfTime(f"{description} has {left} of {recipe.epochs} epochs left")
    run.optimizer.zero_grad()  # a captured step's gradients hold on to the memory of its activations
    if run.ema is not None:
        model.load_state_dict(run.ema.module.state_dict())
    synchronize(model)
    return run.history


def check_images(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse training images that `recipe` cannot be followed with."""
    if len(dataset.train) < recipe.batch_size:
        raise ValueError(
            f"{dataset.name}: {len(dataset.train)} training images do not fill a batch of {recipe.batch_size}"
        )
    if recipe.batch_size % processes()[1]:
        raise ValueError(f"a batch of {recipe.batch_size} cannot be shared evenly among {processes()[1]} processes")
    if recipe.crop >= min(dataset.image_shape[1:]):
        raise ValueError(f"{dataset.name}: a crop may shift by less than an image's side, not by {recipe.crop} pixels")


@contextmanager
def fitting_only(model: nn.Module, part: str) -> Iterator[None]:
    """Inside the block no parameter outside the module at path `part` asks for a gradient; after it, as before."""
    own = set(model.get_submodule(part).parameters())
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in own]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class _Run:
    """The state of a fit between two epochs: weights, optimizer, schedule, moving average, history."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, seed: int, part: str):
        self.model, self.recipe, self.steps, self.seed, self.part = model, recipe, steps, seed, part
        self.forward = DistributedDataParallel(model) if processes()[1] > 1 else model  # averages the gradients
        if recipe.compile:  # a wrapper: the weights, and so checkpoints and averages, stay those of `model`
            self.forward = torch.compile(self.forward)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, steps)
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.history: list[dict] = []
        self.saved = -inf  # when, by `time.monotonic()`
        captures = recipe.capture and next(model.parameters()).is_cuda and processes()[1] == 1
        self.gradients = None if captures else self._gradients  # captured with the first batch

    def epoch(
        self, dataset: Dataset, train: Split | FileSplit, epoch: int, description: str, progress: bool
    ) -> tuple[float, float]:
        self.model.eval().get_submodule(self.part).train()
        device, (number, count) = train.device, processes()
        torch.manual_seed(epoch_seed(self.seed, epoch) + number)  # for networks that draw, by dropout say
        generator = torch.Generator(device).manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(train), generator=generator, device=device)
        rows = order[: self.steps * self.recipe.batch_size].view(self.steps, -1)
        loss_sum = correct = torch.zeros((), device=device)
        title = f"{description} {epoch + 1}/{self.recipe.epochs}"
        hidden = not (progress and is_first())
        bar = tqdm(train.batches(rows), title, self.steps, leave=False, unit="batch", disable=hidden)
        for step, (images, labels) in enumerate(bar):
            images = augment(images, self.recipe, generator)
            images, labels = dataset.normalize(images[number::count]), labels[number::count]
            loss, logits = self._step(images, labels)
            loss_sum = loss_sum + loss
            correct = correct + (logits.argmax(1) == labels).sum()
            if self.ema is not None:
                self.ema.update(self.model, step=epoch * self.steps + step)
        if not torch.isfinite(loss_sum):
            raise FloatingPointError(
                f"{description}: the loss of epoch {epoch + 1} is not finite; lower the learning rate"
            )
        return total(loss_sum).item() / (count * self.steps), 100 * total(correct).item() / rows.numel()

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients = self.gradients or Captured(self._gradients, (images, labels), self.model.buffers())
        loss, logits = self.gradients(images, labels)
        self.optimizer.step()
        self.schedule.step()
        return loss, logits

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch; its gradients are left with the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, self.recipe.precision):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    def _stateful(self) -> dict:
        parts = dict(model=self.model, optimizer=self.optimizer, schedule=self.schedule)
        return parts if self.ema is None else parts | dict(ema=self.ema.module)

    def _identity(self) -> dict:
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        identity = dict(recipe=what_is_fitted(self.recipe), seed=self.seed, steps=self.steps, shapes=shapes)
        return identity | dict(part=self.part) if self.part else identity

    def _is_own(self, identity: object) -> bool:
        """Whether a checkpoint is of this fit; what recipes had no word for when it was written has its default."""
        if not (isinstance(identity, dict) and isinstance(identity.get("recipe"), dict)):
            return False
        defaults = {entry.name: entry.default for entry in fields(Recipe) if entry.default is not MISSING}
        return identity | dict(recipe=what_is_fitted(defaults | identity["recipe"])) == self._identity()

    def is_unsaved(self) -> bool:
        return time.monotonic() - self.saved > UNSAVED

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        write_checkpoint(path, dict(identity=self._identity(), history=self.history, **state))
        self.saved = time.monotonic()

    def restore(self, path: Path) -> None:
        state = read_checkpoint(path)  # each part moves its own to where it belongs; AdamW's counters stay
        if not isinstance(state, dict) or not self._is_own(state.get("identity")):
            raise ValueError(f"{path}: of another network, recipe, seed or data set size; delete it to start again")
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.history = state["history"]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    fused = next(model.parameters()).is_cuda or None  # on a GPU one kernel for all parameters; None: torch's default
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr, fused=fused)
    return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The learning-rate schedule of `recipe`, stepped after every one of `steps` batches an epoch."""
    if recipe.schedule == "multistep":
        return MultiStepLR(optimizer, [m * steps for m in recipe.milestones])
    total = max(1, recipe.epochs * steps)
    warmup = max(recipe.warmup, 1.5 / (total + 1))  # a rise of no length would divide by zero
    return OneCycleLR(optimizer, recipe.lr, total_steps=total + 1, pct_start=warmup, cycle_momentum=False)


def epoch_seed(seed: int, epoch: int) -> int:
    """One well-mixed seed for everything that is random in one epoch of one run."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A random crop (reflected border of `recipe.crop` pixels) and mirror of every uint8 image (n, c, h, w)."""
    n, _, h, w = images.shape
    if recipe.flip:
        mirrored = torch.rand(n, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(3), images)
    if recipe.crop == 0:
        return images
    # Every crop is a window of the padded image: gather the windows' rows and columns with one index each.
    padded = F.pad(images.float(), [recipe.crop] * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * recipe.crop + 1, (2, n, 1), generator=generator, device=images.device)
    rows = (dy + torch.arange(h, device=images.device)).view(n, 1, h, 1)
    columns = (dx + torch.arange(w, device=images.device)).view(n, 1, 1, w)
    windows = padded.gather(2, rows.expand(n, padded.shape[1], h, padded.shape[3]))
    return windows.gather(3, columns.expand(n, padded.shape[1], h, w)).to(images.dtype)
