"""The settings of a training or fine-tuning run."""

from dataclasses import asdict, dataclass
from typing import Any

CHOICES = dict(
    schedule=("one_cycle", "multistep", "cosine"), precision=("auto", "float32", "bfloat16"), optimizer=("sgd", "adamw")
)
INTEGERS = ("epochs", "batch_size", "crop")
NUMBERS = ("lr", "momentum", "weight_decay", "warmup", "label_smoothing", "ema_decay", "mixup", "cutmix")
BOOLEANS = ("flip", "compile", "capture")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a fit: SGD with Nesterov momentum, or AdamW; biases and norms have no weight decay.

    Attributes:
        epochs: number of passes over the training images.
        batch_size: images per step; an incomplete last batch is dropped.
        lr: peak learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD or AdamW.
        schedule: "one_cycle" (cosine up to `lr`, then cosine down to almost 0), "multistep" (divided by 10 at each of
            `milestones`) or "cosine" (linear from 3.3 % of `lr` up to `lr`, then cosine down to 0).
        warmup: share of the steps in which "one_cycle" and "cosine" increase the learning rate.
        milestones: epochs at which "multistep" reduces the learning rate.
        label_smoothing: label smoothing of the cross-entropy loss.
        crop: maximum shift of the random crop in pixels (reflection padding); 0 for no crop.
        flip: mirror half of the images horizontally.
        ema_decay: decay of the exponential moving average of the weights, which replaces the weights after the fit;
            None for no average.
        precision: "float32", "bfloat16" (autocast), or "auto" for the faster of the two on the device.
        compile: compile the network with `torch.compile`, which takes about a minute. On two CPU cores it did not make
            ResNet101 faster (228 instead of 242 images/s in bfloat16).
        optimizer: "sgd" or "adamw".
        capture: launch forward and backward pass as one CUDA graph (see `cuda_graph`); ignored unless on a single GPU.
        mixup, cutmix: parameter alpha of the Beta distribution of timm's mixup and CutMix; 0 for none. With both, each
            batch is mixed by one of them, at random. Each process needs an even number of images per batch.

    >>> Recipe(epochs=30, lr=0.05, flip=False).batch_size
    128

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    warmup: float = 0.2
    milestones: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    crop: int = 4
    flip: bool = True
    ema_decay: float | None = None
    precision: str = "auto"
    compile: bool = False
    optimizer: str = "sgd"
    capture: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        self._check_types()
        self._check_ranges()
        if self.compile and self.capture:
            raise ValueError("recipe: compile and capture cannot be combined, choose one")

    def _check_types(self) -> None:
        for name, allowed in CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(map(repr, allowed))}")
        for name in BOOLEANS:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in INTEGERS:
            self._require(name, isinstance(getattr(self, name), int), "an integer")
        for name in NUMBERS:  # YAML reads 1e-1 as a string and 1.0e-1 as a number
            value = getattr(self, name)
            self._require(name, isinstance(value, int | float) or (name, value) == ("ema_decay", None), "a number")
        self._require("milestones", all(isinstance(epoch, int) for epoch in self.milestones), "integers (epochs)")

    def _check_ranges(self) -> None:
        for name in ("epochs", "crop", "weight_decay", "mixup", "cutmix"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("lr", self.lr > 0, "above 0")
        self._require("warmup", 0 < self.warmup <= 1, "above 0 and at most 1")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            self._require(name, 0 <= (getattr(self, name) or 0.0) < 1, "at least 0 and below 1")

    def _require(self, name: str, valid: bool, kind: str) -> None:
        if not valid:
            raise ValueError(f"recipe: {name} must be {kind}, got {getattr(self, name)!r}")


def result_fields(recipe: Recipe | dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe that affect the result (all except `compile` and `capture`).

    >>> "capture" in result_fields(Recipe(epochs=1))
    False
    """
    recipe = asdict(recipe) if isinstance(recipe, Recipe) else recipe
    return {name: value for name, value in recipe.items() if name not in ("compile", "capture")}
