"""The command `urank measure`: the utilized ranks of a network that the user names."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from urank.attention import explicit_attention
from urank.datasets.folders import labelled_files, readable, shuffled_split, unlabelled_files
from urank.datasets.images import Batches, Dataset, FileSplit, View
from urank.deadline import duration
from urank.distributed import pick_device
from urank.files import read_json, write_json
from urank.layers import coverage
from urank.measure import Measurement, check_options, choose_layers, count_probes, few_images_note, measurable, measure
from urank.models.loading import load_network, preprocessing_of
from urank.search.protocol import Protocol
from urank.search.validation import Validation, predict
from urank.throughput import images_per_second

BATCH_SIZE = 50
# A search took a tenth (convolutional networks) to an eighth (DeiT-Tiny) of one full pass per probe.
USUAL_SHARE = 0.125
DEFAULTS = dict(budget=None, keep=None, sides="both", factors="output")


def measure_command(
    model: Annotated[
        str, typer.Argument(help="A timm or torchvision network, or module:function for one that a function returns.")
    ],
    images: Annotated[
        Path,
        typer.Option(
            help="Folder of images, one folder per class (class number or ImageNet synset), or with the folders train "
            "(calibration) and val (validation) in it."
        ),
    ],
    weights: Annotated[Path | None, typer.Option(help="File of weights: .safetensors, .pt or .pth.")] = None,
    match: Annotated[str, typer.Option(help="How tensors of --weights find their place: name or order.")] = "name",
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Count agreement with the network's own predictions; needs no labels.")
    ] = False,
    calibration: Annotated[int, typer.Option(help="Number of calibration images, for the Gram matrices.")] = 500,
    validation: Annotated[int | None, typer.Option(help="Number of validation images; default: all others.")] = None,
    tolerance: Annotated[float, typer.Option(help="Accuracy points that one projection may cost.")] = 0.1,
    budget: Annotated[
        float | None, typer.Option(help="Accuracy points that all projections may cost, in place of --tolerance.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the parameters to keep (0 to 1); ranks by energy, no search.")
    ] = None,
    sides: Annotated[str, typer.Option(help="both, or only the input or output side of each layer.")] = "both",
    factors: Annotated[
        str, typer.Option(help="How layers are split: output (closest outputs at that rank) or paper (P_S W P_T).")
    ] = "output",
    mode: Annotated[str, typer.Option(help="joint (projections stay in place) or isolated.")] = "joint",
    evaluation: Annotated[str, typer.Option(help="fast, or exact for every image in every probe.")] = "fast",
    layers: Annotated[list[str] | None, typer.Option(help='Only these layers, e.g. "blocks.*". Repeatable.')] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the image in pixels.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel, from 0 to 1, e.g. 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation per channel.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Side of the crop over the shorter side of the image.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear or bicubic.")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave out damaged images.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU if there is one.")] = "auto",
    memory: Annotated[float | None, typer.Option(help="GiB of activations to keep between probes.")] = None,
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which no layer is started.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default urank-MODEL.")] = None,
    decompose: Annotated[bool, typer.Option("--decompose", help="Also write the compact network.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured; then stop.")] = False,
) -> None:
    """Measure the utilized rank of every layer of a network, and write a report.

    Writes plan.json, results.json, layers.csv, snapshot.svg, snapshot.png and report.html. When it is killed or out of
    time, the same command resumes after the last finished layer.
    """
    started = time.monotonic()
    protocol = Protocol(tolerance, mode, budget, sides)
    check_options(protocol, keep, factors)
    network = explicit_attention(load_network(model, weights, match)).to(pick_device(device))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = dict(size=input_size, mean=numbers(mean), std=numbers(std), interpolation=interpolation)
    view = preprocessing(preprocessing_of(model, network), given, crop_pct)
    data = Images(images, network, view, agreement, calibration, validation, skip_unreadable)
    patterns = layers or ["*"]
    typer.echo(outlook(model, network, data, patterns, protocol, keep))
    if dry_run:
        return
    folder = out or Path(f"urank-{model.replace('/', '-').replace(':', '-')}")
    settings = dict(model=model, weights=str(weights), images=str(images.resolve()), agreement=agreement)
    settings |= dict(calibration=calibration, validation=validation, tolerance=tolerance, mode=mode)
    settings |= dict(evaluation=evaluation, layers=patterns, preprocessing=view)
    later = dict(budget=budget, keep=keep, sides=sides, factors=factors)  # not in the folders of earlier versions
    settings |= {name: value for name, value in later.items() if value != DEFAULTS[name]}
    claim(folder, settings)
    measured = measure(
        network,
        data.calibration,
        data.validation,
        tolerance,
        mode,
        evaluation,
        patterns,
        None if memory is None else int(memory * 2**30),
        checkpoint=folder / "search.json",
        deadline=None if time_budget is None else started + time_budget,
        budget=budget,
        sides=sides,
        keep=keep,
        factors=factors,
    )
    finish(measured, folder, model, decompose)


def finish(measured: Measurement, folder: Path, model: str, decompose: bool) -> None:
    """Write the results and print the summary."""
    measured.save(folder, model)
    typer.echo(measured.summary())
    typer.echo(f"Report: {folder / 'report.html'}")
    if decompose:
        measured.save_compact(folder / "compact")
        typer.echo(f"Compact network: {folder / 'compact'}; read it with urank.load_compact(network, folder)")


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Return three numbers from "0.5,0.5,0.5"; None for None."""
    if text is None:
        return None
    try:
        first, second, third = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"expected three numbers separated by commas, got {text!r}") from error
    return first, second, third


def preprocessing(own: dict, given: dict, crop_pct: float | None) -> dict:
    """Return the network's own preprocessing with what the user gave in its place."""
    share = crop_pct or own["size"] / own["resize"]
    chosen = own | {name: value for name, value in given.items() if value is not None}
    if not 0 < share <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, got {crop_pct}")
    return chosen | (dict(resize=int(chosen["size"] / share)) if crop_pct or given["size"] else {})


@dataclass(frozen=True)
class Images:
    """The calibration and validation images of a measurement.

    Attributes:
        folder: one folder per class, or the folders train and val with these; any images with `agreement`.
        network: the network that is to classify them.
        view: size, resize, interpolation, mean and std.
        agreement: images need no labels.
        calibrate, validate: numbers of images; None for all others.
        skip_unreadable: leave out images that cannot be decoded.
    """

    folder: Path
    network: nn.Module
    view: dict
    agreement: bool
    calibrate: int
    validate: int | None
    skip_unreadable: bool

    @cached_property
    def classes(self) -> int:
        """The number of logits, from a forward pass of one image.

        Raises:
            ValueError: the network does not accept images of this size, or its output is not (n, classes).
        """
        size = self.view["size"]
        image = next(self.network.parameters()).new_zeros(1, 3, size, size)
        try:
            with torch.no_grad():
                logits = self.network(image)
        except Exception as error:  # whatever the network raises, the size is the likely reason
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"the network does not accept images of {size} pixels ({reason}); set --input-size"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("the network is not an image classifier: its output is not a tensor (n, classes)")
        return logits.shape[1]

    @cached_property
    def parts(self) -> tuple[FileSplit, FileSplit]:
        """Calibration and validation images."""
        if (self.folder / "train").is_dir() and (self.folder / "val").is_dir():
            train, val = self.split(self.folder / "train"), self.split(self.folder / "val")
            return train.take(self.calibrate), val.take(self.validate)
        whole = self.split(self.folder)
        if len(whole) <= self.calibrate:
            raise ValueError(
                f"{self.folder}: {len(whole)} images are too few for {self.calibrate} calibration images and others "
                "for validation; set --calibration"
            )
        return whole.take(self.calibrate), whole[self.calibrate :].take(self.validate)

    def split(self, folder: Path) -> FileSplit:
        """Return the images of a folder in a seeded random order."""
        files, labels = (unlabelled_files(folder), None) if self.agreement else labelled_files(folder, self.classes)
        view = View(**{key: value for key, value in self.view.items() if key not in ("mean", "std")})
        if self.skip_unreadable:
            marks = readable(files, view)
            files = [file for file, good in zip(files, marks) if good]
            labels = labels and [label for label, good in zip(labels, marks) if good]
            typer.echo(f"{folder}: {marks.count(False)} of {len(marks)} images are unreadable and left out")
        return shuffled_split(files, labels, view)

    def batches(self, split: FileSplit) -> Batches:
        """Return normalized batches, read from the files when they are needed."""
        data = Dataset("images", self.classes, split, split, self.view["mean"], self.view["std"])
        return data.batches(split.feed(next(self.network.parameters()).device), BATCH_SIZE)

    @property
    def calibration(self) -> Batches:
        return self.batches(self.parts[0])

    @cached_property
    def validation(self) -> Validation:
        """The validation images with their labels, or with the network's own predictions."""
        batches = self.batches(self.parts[1])
        return Validation.agreement(self.network, batches) if self.agreement else Validation(batches)


def outlook(
    model: str,
    network: nn.Module,
    data: Images,
    patterns: Sequence[str],
    protocol: Protocol,
    keep: float | None,
) -> str:
    """Return what will be measured, with how many images and probes, and about how long it will take."""
    calibration, validation = data.parts
    [(image, _)] = data.batches(validation.take(1))
    with torch.no_grad():
        predict(network, image)  # raises an error if the network changes its input in place
    separate = measurable(network, image)
    names = choose_layers(separate, image, patterns)
    frame = coverage(separate, image)
    chosen, left_out = frame["layer"].isin(names), frame[~frame["layer"].isin(names)]
    reasons = left_out.assign(reason=left_out["reason"].replace("", "not among --layers")).groupby("reason")["share"]
    lines = [
        f"{model}: {len(names)} layers with {100 * frame.loc[chosen, 'share'].sum():.1f} % of the parameters",
        *(f"  skipped ({100 * share:.1f} % of the parameters): {reason}" for reason, share in reasons.sum().items()),
        f"images: {len(calibration):,} for calibration, {len(validation):,} for validation, "
        f"{data.view['size']} x {data.view['size']} pixels",
    ]
    if keep is not None:
        return "\n".join([*lines, f"ranks: by energy for {100 * keep:g} % of the parameters; no probes"])
    batch = image.repeat(min(16, len(validation)), 1, 1, 1)
    seconds = len(validation) / images_per_second(dict(network=separate), batch, seconds=1)["network"]
    lines += effort(count_probes(separate, names, protocol.sides), seconds, image.device)
    note = few_images_note(protocol.tolerance if protocol.budget is None else None, len(validation))
    return "\n".join([*lines, *filter(None, [note])])


def effort(probes: int, seconds: float, device: torch.device) -> list[str]:
    """Return how long a search takes if one pass over the validation images takes `seconds`."""
    expected, most = duration(USUAL_SHARE * probes * seconds), duration(probes * seconds)
    return [
        f"probes: at most {probes:,}; one pass over the validation images takes about {duration(seconds)}",
        f"expected: about {expected}, at most {most}, on {device}",
    ]


def claim(folder: Path, settings: dict) -> None:
    """Note in `folder` what is measured there; raise an error if it holds another measurement."""
    path, settings = folder / "measurement.json", json.loads(json.dumps(settings))
    if path.exists() and (before := read_json(path)) != settings:
        differing = [name for name in settings | before if before.get(name) != settings.get(name)]
        names = ", ".join(differing)
        raise ValueError(f"{folder}: contains another measurement (other {names}); choose another --out")
    write_json(path, settings)
