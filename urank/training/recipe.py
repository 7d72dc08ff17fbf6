"""How a network is trained: the settings of one fit."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recipe:
    """How to fit a network: SGD with Nesterov momentum or AdamW, weight decay on weights only.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; an incomplete last batch is dropped.
        lr: peak learning rate.
        optimizer: "sgd" or "adamw".
        momentum: of SGD.
        weight_decay: of either; biases and norms are not decayed.
        schedule: "one_cycle" (cosine up to `lr`, cosine down to nearly 0) or "multistep" (divided by 10 at each
            of `milestones`).
        warmup: share of the steps over which "one_cycle" rises.
        milestones: epochs at which "multistep" drops the learning rate.
        label_smoothing: of the cross-entropy.
        crop: largest shift in pixels of the random crop (reflected border); 0 for none.
        flip: mirror half of the images.
        ema_decay: decay of an exponential moving average of the weights, which is then what `fit` leaves in the
            network; None for none.
        precision: "auto" is bfloat16 autocast where the device multiplies it faster than float32, else float32.
        compile: run the network through `torch.compile`; a minute or so at the start, for fits much longer than that.
            On two cores a ResNet101 was no faster with it (228 against 242 images/s in bfloat16).
        capture: launch a batch's forward and backward pass as one (see `capture`), on a single GPU; elsewhere ignored.
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

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))
        numbers = dict(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, warmup=self.warmup)
        numbers |= dict(label_smoothing=self.label_smoothing, ema_decay=self.ema_decay or 0.0)
        for name, value in numbers.items():
            if not isinstance(value, int | float):  # YAML reads 1e-1 as a text: it wants 1.0e-1
                raise ValueError(f"recipe: {name} must be a number, got {value!r}")
        if not all(isinstance(value, int) for value in (self.epochs, self.batch_size, self.crop)):
            raise ValueError(f"recipe: epochs, batch_size and crop must be whole numbers, got {self}")
        if not (
            self.epochs >= 0 and self.batch_size >= 1 and self.crop >= 0 and self.lr > 0 and self.weight_decay >= 0
        ):
            raise ValueError(f"recipe: needs batch_size >= 1, lr > 0, epochs, crop and weight_decay >= 0, got {self}")
        shares = (self.momentum, self.label_smoothing, self.ema_decay or 0.0)
        if not (0 < self.warmup <= 1 and all(0 <= share < 1 for share in shares)):
            raise ValueError(
                f"recipe: needs 0 < warmup <= 1; momentum, label_smoothing and ema_decay in [0, 1), got {self}"
            )
        if self.compile and self.capture:
            raise ValueError("recipe: compile and capture are two ways to the same end, choose one")
        if self.schedule not in ("one_cycle", "multistep"):
            raise ValueError(f"recipe: schedule is 'one_cycle' or 'multistep', not {self.schedule!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"recipe: precision is 'auto', 'float32' or 'bfloat16', not {self.precision!r}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"recipe: optimizer is 'sgd' or 'adamw', not {self.optimizer!r}")
        for name, value in dict(flip=self.flip, compile=self.compile, capture=self.capture).items():
            if not isinstance(value, bool):
                raise ValueError(f"recipe: {name} is true or false, not {value!r}")
        if not all(isinstance(epoch, int) for epoch in self.milestones):
            raise ValueError(f"recipe: milestones are epochs, whole numbers, not {self.milestones}")


def what_is_fitted(recipe: Recipe | dict) -> dict:
    """A recipe without what decides only how fast it is."""
    recipe = asdict(recipe) if isinstance(recipe, Recipe) else recipe
    return {name: value for name, value in recipe.items() if name not in ("compile", "capture")}
