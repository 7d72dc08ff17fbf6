"""Train a network: `fit` with a `Recipe`.

The order and the augmentation of the images in an epoch depend only on the seed and the epoch number. A run that was
interrupted and resumed therefore uses the same images as an uninterrupted one. On a CPU, `fit` is deterministic.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from tqdm import tqdm

from urank.attention import unfused_attention
from urank.datasets import Dataset, FileSplit, Split
from urank.deadline import OutOfTime, is_over
from urank.distributed import is_first, processes, synchronize, total
from urank.files import read_checkpoint, write_checkpoint
from urank.numerics import arithmetic, autocast, benchmarked_convolutions, ieee_float32
from urank.training.cuda_graph import CapturedFunction
from urank.training.recipe import Recipe, result_fields

WARMUP_START = 0.033  # learning rate of the first step of "cosine", as a share of the highest; as in torchvision
SAVE_INTERVAL = 20.0  # seconds; after a shorter epoch no checkpoint is written


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
    """Train `model` in place on `dataset.train` and return its history.

    Several processes (see `distributed`) share each batch; each has its own batch-norm statistics.

    Args:
        model: network that maps normalized images (n, 3, h, w) to logits (n, classes); it is moved to `device`.
        seed: seed of the order and the augmentation of the images.
        checkpoint: file from which an interrupted fit is resumed. It is written after the first and the last epoch of a
            call, and whenever the last write is more than `SAVE_INTERVAL` seconds ago.
        description: title of the progress bar, and name of the fit in error messages.
        part: path of the submodule to train; default: the whole network. The rest of the network stays in evaluation
            mode and keeps its parameters and batch-norm statistics.
        deadline: value of `time.monotonic()`. An epoch only starts if it is expected to end before the deadline, judged
            by the duration of the one before. The first epoch of a call always runs.
        progress: show a progress bar.

    Returns:
        One dictionary per epoch: epoch, loss, accuracy (percent), seconds, precision ("float32" or "bfloat16"). Loss
        and accuracy are averages over the augmented images during the epoch.

    >>> import urank
    >>> from urank import datasets
    >>> digits, network = datasets.load("digits10", train=200, test=20), urank.create("vgg11", width=0.05)
    >>> history = fit(network, digits, Recipe(epochs=1, batch_size=50, flip=False), progress=False)
    >>> list(history[0])
    ['epoch', 'loss', 'accuracy', 'seconds', 'precision']

    Raises:
        ValueError: there are fewer training images than one batch, the images are not larger than the crop's shift,
            batches cannot be mixed, or the checkpoint belongs to another fit.
        FloatingPointError: the loss is NaN or infinite.
        OutOfTime: the deadline is too close for the remaining epochs.
    """
    if recipe.epochs:
        check_images(dataset, recipe)
    cast(Any, model).to(device, memory_format=torch.channels_last)  # torch's annotations lack `memory_format`
    train = dataset.train.feed(device)
    generators = [train.device] if train.device.type == "cuda" else []
    # An epoch sets the seed of torch's global generators: restore the state that the caller's generators had.
    with (
        fitting_only(model, part),
        torch.random.fork_rng(generators),
        numpy_state_kept(),
        ieee_float32(),
        benchmarked_convolutions(),
        unfused_attention(model),
    ):
        run = _Run(model, recipe, steps=len(dataset.train) // recipe.batch_size, seed=seed, part=part)
        if checkpoint is not None and checkpoint.exists():
            run.restore(checkpoint)
        while len(run.history) < recipe.epochs:
            seconds = run.epoch(dataset, train, description, progress)
            left = recipe.epochs - len(run.history)
            stops = left > 0 and is_over(deadline, seconds)
            if checkpoint is not None and (run.is_save_due() or stops or not left):
                run.save(checkpoint)
            if stops:
                raise OutOfTime(f"{description} has {left} of {recipe.epochs} epochs left")
    run.finish()
    return run.history


def check_images(dataset: Dataset, recipe: Recipe) -> None:
    """Raise ValueError if the recipe cannot be applied to the training images."""
    if len(dataset.train) < recipe.batch_size:
        raise ValueError(
            f"{dataset.name}: {len(dataset.train)} training images do not fill a batch of {recipe.batch_size}"
        )
    if recipe.batch_size % processes()[1]:
        raise ValueError(f"a batch of {recipe.batch_size} cannot be divided evenly among {processes()[1]} processes")
    share = recipe.batch_size // processes()[1]
    if (recipe.mixup or recipe.cutmix) and share % 2:
        raise ValueError(f"mixup and cutmix need an even number of images per batch and process, got {share}")
    if recipe.crop >= min(dataset.image_shape[1:]):
        raise ValueError(f"{dataset.name}: crop must be smaller than the images, got a shift of {recipe.crop} pixels")


@contextmanager
def numpy_state_kept() -> Iterator[None]:
    """Restore the state of NumPy's global generator, which timm's `Mixup` uses, after the block."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextmanager
def fitting_only(model: nn.Module, part: str) -> Iterator[None]:
    """Disable gradients for all parameters outside the submodule `part` inside the block."""
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
    """The state of a fit between two epochs: weights, optimizer, schedule, moving average and history."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, seed: int, part: str):
        self.model, self.recipe, self.steps, self.seed, self.part = model, recipe, steps, seed, part
        self.forward: Callable[[Tensor], Tensor] = model
        if processes()[1] > 1:
            self.forward = DistributedDataParallel(model)  # averages the gradients
        if recipe.compile:  # a wrapper: checkpoints and averages use the weights of `model`
            self.forward = torch.compile(self.forward)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, steps)
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.history: list[dict] = []
        self.saved = -inf  # time of the last save, from `time.monotonic()`
        captures = recipe.capture and next(model.parameters()).is_cuda and processes()[1] == 1
        self.gradients: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None if captures else self._gradients

    def epoch(self, dataset: Dataset, train: Split | FileSplit, description: str, progress: bool) -> float:
        """Train for one epoch, add it to the history and return its duration in seconds."""
        start, epoch = time.perf_counter(), len(self.history)
        self.model.eval().get_submodule(self.part).train()
        title, hidden = f"{description} {epoch + 1}/{self.recipe.epochs}", not (progress and is_first())
        batches = self._batches(dataset, train, epoch)
        loss_sum = correct = torch.zeros((), device=train.device)
        for step, (images, labels) in enumerate(
            tqdm(batches, title, self.steps, leave=False, unit="batch", disable=hidden)
        ):
            batch_loss, logits = self._step(images, labels, epoch * self.steps + step)
            loss_sum = loss_sum + batch_loss
            correct = correct + (logits.argmax(1) == likeliest(labels)).sum()
            if self.ema is not None:
                self.ema.update(self.model, step=epoch * self.steps + step)
        if not torch.isfinite(loss_sum):
            raise FloatingPointError(
                f"{description}: the loss of epoch {epoch + 1} is not finite; lower the learning rate"
            )
        loss = total(loss_sum).item() / (processes()[1] * self.steps)
        accuracy = 100 * total(correct).item() / (self.steps * self.recipe.batch_size)
        seconds, precision = time.perf_counter() - start, arithmetic(train.device, self.recipe.precision)
        self.history.append(dict(epoch=epoch, loss=loss, accuracy=accuracy, seconds=seconds, precision=precision))
        return seconds

    def _batches(self, dataset: Dataset, train: Split | FileSplit, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of each augmented, normalized and mixed batch of an epoch."""
        rank, count = processes()
        mix = make_mixup(self.recipe, dataset.classes)
        np.random.seed([epoch_seed(self.seed, epoch), rank])  # for `mix`
        torch.manual_seed(epoch_seed(self.seed, epoch) + rank)  # for networks that use random numbers, such as dropout
        generator = torch.Generator(train.device).manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(train), generator=generator, device=train.device)
        rows = order[: self.steps * self.recipe.batch_size].view(self.steps, -1)
        for images, labels in train.batches(rows):
            images = augment(images, self.recipe, generator)
            images, labels = dataset.normalize(images[rank::count]), labels[rank::count]
            yield mix(images, labels) if mix else (images, labels)

    def _step(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Update the weights in step `number` of the fit; return the loss and the logits (n, classes) of a batch."""
        if self.gradients is None:
            self.gradients = CapturedFunction(self._gradients, (images, labels), self.model.buffers())
        loss, logits = self.gradients(images, labels)
        self.optimizer.step()
        if isinstance(self.schedule, LRScheduler):
            self.schedule.step()
        else:
            self.schedule.step_update(number + 1)
        return loss, logits

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients for a batch and return its loss and logits."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, self.recipe.precision):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    def finish(self) -> None:
        """Free the gradients, put the moving average into the model and synchronize the processes."""
        self.optimizer.zero_grad()  # the gradients of a CUDA graph keep the memory of its activations
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        synchronize(self.model)

    def _stateful(self) -> dict[str, Any]:
        """Return the objects whose state is part of a checkpoint."""
        parts = dict(model=self.model, optimizer=self.optimizer, schedule=self.schedule)
        return parts if self.ema is None else parts | dict(ema=self.ema.module)

    def _identity(self) -> dict:
        """Return everything that determines the result of the fit, except the images."""
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        identity = dict(recipe=result_fields(self.recipe), seed=self.seed, steps=self.steps, shapes=shapes)
        return identity | dict(part=self.part) if self.part else identity

    def _is_own(self, identity: object) -> bool:
        """Return True if a checkpoint belongs to this fit; recipe fields it does not have count as default values."""
        if not (isinstance(identity, dict) and isinstance(identity.get("recipe"), dict)):
            return False
        defaults = {entry.name: entry.default for entry in fields(Recipe) if entry.default is not MISSING}
        return identity | dict(recipe=result_fields(defaults | identity["recipe"])) == self._identity()

    def is_save_due(self) -> bool:
        """Return True if the last save is more than `SAVE_INTERVAL` seconds ago."""
        return time.monotonic() - self.saved > SAVE_INTERVAL

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        write_checkpoint(path, dict(identity=self._identity(), history=self.history, **state))
        self.saved = time.monotonic()

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; raise ValueError if it belongs to another fit."""
        state = read_checkpoint(path)  # on the CPU: each part copies its state to its own device
        if not isinstance(state, dict) or not self._is_own(state.get("identity")):
            raise ValueError(
                f"{path}: written for another network, recipe, seed or number of images; delete it to start again"
            )
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.history = state["history"]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of the recipe; biases and norms have no weight decay."""
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    fused = next(model.parameters()).is_cuda or None  # on a GPU, one kernel for all parameters; None is torch's default
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr, fused=fused)
    return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused)


def make_mixup(recipe: Recipe, classes: int) -> Mixup | None:
    """Return the mixing of images and labels that the recipe wants, or None; the loss smooths the labels."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)


def likeliest(labels: Tensor) -> Tensor:
    """Return class numbers (n,) of labels (n,), or of the class probabilities (n, classes) of mixed images."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler | CosineLRScheduler:
    """Return the learning-rate schedule of the recipe for `steps` batches per epoch; step it after every batch."""
    if recipe.schedule == "multistep":
        return MultiStepLR(optimizer, [epoch * steps for epoch in recipe.milestones])
    total = max(1, recipe.epochs * steps)
    if recipe.schedule == "cosine":
        rising = min(round(recipe.warmup * total), total - 1)
        options: dict[str, Any] = dict(warmup_prefix=True, t_in_epochs=False)
        return CosineLRScheduler(
            optimizer, total - rising, warmup_t=rising, warmup_lr_init=WARMUP_START * recipe.lr, **options
        )
    warmup = max(recipe.warmup, 1.5 / (total + 1))  # a warm-up of length 0 would divide by zero
    return OneCycleLR(optimizer, recipe.lr, total_steps=total + 1, pct_start=warmup, cycle_momentum=False)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of the random numbers of one epoch, well mixed from the seed of the run and the epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirror and crop every uint8 image (n, c, h, w) at random, with reflection padding of `recipe.crop` pixels."""
    n, _, h, w = images.shape
    if recipe.flip:
        mirrored = torch.rand(n, generator=generator, device=images.device) < 0.5
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(3), images)
    if recipe.crop == 0:
        return images
    # Each crop is a window of the padded image: gather its rows, then its columns.
    padded = F.pad(images.float(), [recipe.crop] * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * recipe.crop + 1, (2, n, 1), generator=generator, device=images.device)
    rows = (dy + torch.arange(h, device=images.device)).view(n, 1, h, 1)
    columns = (dx + torch.arange(w, device=images.device)).view(n, 1, 1, w)
    windows = padded.gather(2, rows.expand(n, padded.shape[1], h, padded.shape[3]))
    return windows.gather(3, columns.expand(n, padded.shape[1], h, w)).to(images.dtype)
