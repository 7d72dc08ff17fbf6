"""Compare a naive implementation with this package, one after the other in one process, as ratios.

    python -m benchmarks.speed                    # all parts at their default sizes
    python -m benchmarks.speed --only grams --images 200

Wall time and CPU time are measured; other load on the machine affects CPU time less. A row says whether both sides give
the same result.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer  # waits until a GPU has done what it was told, then reads the clock

import urank
from benchmarks import naive
from urank import datasets
from urank.conv_gram import assemble_gram, patch_products
from urank.files import read_json, write_json
from urank.layers import evaluating, matrix_layers
from urank.memory import give_back_freed_memory
from urank.numerics import arithmetic, describe
from urank.reproduction import profiles
from urank.throughput import images_per_second

OUT = Path(__file__).parents[1] / "data" / "benchmarks" / "speed.json"
# network -> width, validation images, epochs of training (a quarter of them for a transformer): enough images that
# validation takes most of the time, and enough epochs that nearly all images are correct
SEARCHES = {"vgg11": (0.25, 10_000, 6), "resnet18": (1.0, 1000, 6), "deit": (0.34, 300, 8)}
SEARCH_TOLERANCE = 0.1  # the paper's
TOLERANCE = 0.5  # for the other parts, which use few images
TRAINED = ("vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet50", "resnet101")
GPU_TRAINED = ("vgg16", "vgg11", "resnet18", "resnet101")


@dataclass
class Measured:
    """The result of a call, its wall time and CPU time in seconds, and the bytes of memory it added at its peak.

    The memory is that of the GPU if one is used, else that of the process.
    """

    result: Any
    seconds: float
    processor: float
    peak: int


def measured(call: Callable[[], Any], gpu: bool = False) -> Measured:
    """Run `call` and measure it."""
    before = reset_peak(gpu)
    clock, processor = timer(), time.process_time()
    result = call()
    return Measured(result, timer() - clock, time.process_time() - processor, peak(gpu) - before)


def reset_peak(gpu: bool) -> int:
    """Reset the peak of resident memory (on Linux) and return the bytes that are resident now.

    Freed memory is returned to the system first, because memory that is reused would not count.
    """
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    give_back_freed_memory()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak(gpu)


def peak(gpu: bool) -> int:
    """Return the peak of GPU or resident memory in bytes; 0 if the system does not report it."""
    if gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def summed(calls: Sequence[Measured]) -> Measured:
    """Return the total time and the largest memory of several calls."""
    seconds, processor = sum(call.seconds for call in calls), sum(call.processor for call in calls)
    return Measured(None, seconds, processor, max(call.peak for call in calls))


def row(part: str, what: str, naive_side: Measured, ours: Measured, same: bool, **more: Any) -> dict:
    """Return one comparison as a row of the results."""
    return dict(
        part=part,
        what=what,
        ratio=round(naive_side.seconds / ours.seconds, 2),
        processor_ratio=round(naive_side.processor / ours.processor, 2),
        same=same,
        naive_seconds=round(naive_side.seconds, 1),
        seconds=round(ours.seconds, 1),
        naive_peak_mib=naive_side.peak >> 20,
        peak_mib=ours.peak >> 20,
        **more,
    )


@cache  # a search does not change its network
def trained(network: str, width: float, epochs: int = 2) -> tuple[nn.Module, datasets.Dataset]:
    """Train `network` briefly on the embedded digits, plain ones for a transformer."""
    transformer = network in ("vit", "deit", "swin")
    digits = datasets.load("digits10", train=3000 if transformer else 6000, test=10_000, plain=transformer)
    torch.manual_seed(0)
    model = urank.create(network, 10, width)
    if transformer:
        recipe = urank.Recipe(epochs=4 * epochs, batch_size=25, optimizer="adamw", lr=0.001, crop=1, flip=False)
    else:
        recipe = urank.Recipe(epochs=epochs, batch_size=64, lr=0.05, crop=2, flip=False)
    urank.fit(model, digits, recipe)
    return model.eval(), digits


def search_part(network: str, images: int | None) -> list[dict]:
    """Compare the naive search with `search_ranks`: time, and whether probes, decisions and ranks are equal."""
    width, default, epochs = SEARCHES[network]
    model, digits = trained(network, width, epochs)
    grams = urank.accumulate_grams(model, digits.batches(digits.train.take(2000)))
    batches = list(digits.batches(digits.test.take(images or default)))
    slow = measured(lambda: naive.search(model, grams, batches, SEARCH_TOLERANCE))
    rows = []
    for evaluation in ("exact", "fast"):
        options = dict(tolerance=SEARCH_TOLERANCE, evaluation=evaluation)
        ours = measured(lambda options=options: urank.search_ranks(model, grams, batches, **options))
        plan = ours.result
        failed = sum(not probe.passed for probe in plan.probes)
        more = dict(images=plan.total, correct=plan.correct, probes=len(plan.probes), failed=failed)
        how = evaluation if evaluation == "exact" else f"fast in {plan.precision}"
        what = f"{network}, width {width:g}, {len(grams)} layers, {how}"
        rows.append(row("search", what, slow, ours, same_plan(slow.result, plan), **more))
    return rows


def same_plan(one: urank.RankPlan, other: urank.RankPlan) -> bool:
    """Return whether two plans have the same probes, decisions, ranks and numbers of correct images."""
    asked = [[(p.layer, p.side, p.k, p.passed) for p in plan.probes] for plan in (one, other)]
    return asked[0] == asked[1] and one.layers == other.layers


def grams_part(images: int | None, width: float = 1.0) -> list[dict]:
    """Compare `unfold` and one float64 product per batch with `patch_products`, on the inputs of VGG11's layers."""
    model = urank.create("vgg11", width=width).eval()
    rows, took = [], []
    for name, (conv, inputs) in inputs_of(model, torch.randn(images or 2048, 3, 32, 32)).items():
        slow, fast = (measured(partial(side, conv, inputs.split(64))) for side in (unfolded_gram, shared_gram))
        error = (slow.result - fast.result).abs().max() / slow.result.abs().max()
        what = f"{name}, {conv.in_channels} channels, {inputs.shape[2]} x {inputs.shape[3]}"
        rows.append(row("Gram matrix", what, slow, fast, bool(error < 1e-10), relative_error=f"{error:.0e}"))
        took.append((replace(slow, result=None), replace(fast, result=None)))  # the matrices are large
    return [*rows, row("Gram matrix", "all of them", *map(summed, zip(*took)), all(one["same"] for one in rows))]


def unfolded_gram(conv: nn.Conv2d, batches: Sequence[Tensor]) -> Tensor:
    return sum(naive.gram(conv, batch) for batch in batches)


def shared_gram(conv: nn.Conv2d, batches: Sequence[Tensor]) -> Tensor:
    return assemble_gram(conv, batches[0].shape[2:], sum(patch_products(conv, batch) for batch in batches))


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Return every convolution with its input."""
    seen: dict[str, tuple[nn.Conv2d, Tensor]] = {}
    convolutions = {name: layer for name, layer in matrix_layers(model).items() if isinstance(layer, nn.Conv2d)}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen.update({name: (layer, args[0].clone())}))
        for name, layer in convolutions.items()
    ]
    with evaluating(model):
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def scaling_part(images: int | None) -> list[dict]:
    """Measure the exact search while the number of images, the width or the depth changes."""
    rows = []
    for network, width, count in scaling_sizes(images or 500):
        model, digits = trained(network, width, epochs=3)
        grams = urank.accumulate_grams(model, digits.batches(digits.train.take(1000)), progress=False)
        batches = list(digits.batches(digits.test.take(count)))
        took = measured(lambda g=grams, b=batches, m=model: urank.search_ranks(m, g, b, TOLERANCE, evaluation="exact"))
        cost = urank.count_cost(model)
        rows.append(
            dict(part="scaling", what=f"{network}, width {width:g}, {count} images", network=network, width=width)
            | dict(images=count, layers=len(grams), macs=cost.macs, probes=len(took.result.probes))
            | dict(seconds=round(took.seconds, 1), processor=round(took.processor, 1), peak_mib=took.peak >> 20)
        )
    return rows


def scaling_sizes(images: int) -> list[tuple[str, float, int]]:
    base, width = "vgg11", 0.25
    counts = [(base, width, count) for count in (images, 2 * images, 4 * images)]
    widths = [(base, other, images) for other in (width / 2, 2 * width)]
    return counts + widths + [(deeper, width, images) for deeper in ("vgg13", "vgg16", "vgg19")]


def gpu_training_part(images: int | None) -> Iterator[dict]:
    if not torch.cuda.is_available():
        typer.echo("skipping gpu-training: there is no GPU", err=True)
        return
    yield from training_part(images or 20_000, GPU_TRAINED, "cuda")


def training_part(images: int | None, networks: Sequence[str] = TRAINED, device: str = "cpu") -> Iterator[dict]:
    """Measure the training throughput of `fit` in images/s with the recipes of the `cifar` profile.

    In float32, in bfloat16 and, on a GPU, as a CUDA graph. The images are digits; their content does not matter.
    """
    digits = datasets.load("digits10", train=images or 1280, test=100)
    cifar = profiles.load_profile("cifar")
    for name in networks:
        yield training_row(name, digits, cifar.find(f"cifar10/{name}").train, torch.device(device))


def training_row(network: str, digits: datasets.Dataset, recipe: urank.Recipe, device: torch.device) -> dict:
    recipe = replace(recipe, capture=False)
    ways = dict(float32=dict(precision="float32"), bfloat16=dict(precision="bfloat16"))
    if device.type == "cuda":
        ways["captured"] = dict(precision="bfloat16", capture=True)
    rates = {way: pace(network, digits, replace(recipe, epochs=4, **options), device) for way, options in ways.items()}
    return dict(
        part="training",
        what=network,
        batch=recipe.batch_size,
        **{way: float(f"{rate:.3g}") for way, rate in rates.items()},
        ratio=round(rates["bfloat16"] / rates["float32"], 2),
        auto=arithmetic(device, "auto"),
        device=describe(device),
    )


def pace(network: str, digits: datasets.Dataset, recipe: urank.Recipe, device: torch.device) -> float:
    """Return images/s of the median epoch, without the first one, in which the device warms up."""
    torch.manual_seed(0)
    history = urank.fit(urank.create(network, 10), digits, recipe, device=device, progress=False)
    seen = len(digits.train) // recipe.batch_size * recipe.batch_size
    return seen / median(epoch["seconds"] for epoch in history[1:])


def vit_part(images: int | None) -> list[dict]:
    """Measure the full search of a ViT-B/16 at 224 pixels on a GPU; a CPU would take weeks."""
    if not torch.cuda.is_available():
        typer.echo("skipping vit: there is no GPU", err=True)
        return []
    model = urank.explicit_attention(urank.create("torchvision/vit_b_16", classes=1000))
    nn.init.trunc_normal_(
        model.heads.head.weight, std=0.02
    )  # torchvision initializes it with zeros, which predicts one class
    return [whole_search("ViT-B/16, 224 pixels", model.cuda(), (3, 224, 224), images or 10000)]


def whole_search(what: str, model: nn.Module, shape: tuple[int, ...], images: int) -> dict:
    """Measure a search of `model`, and extrapolate to ImageNet's 50,000 validation images.

    Weights and images are random and agreement replaces labels, because time depends on them only through the share of
    probes that fail. Images/s and TFLOP/s are what a naive search would need for the same time. The TFLOP/s of the
    device are those of one large product in bfloat16.
    """
    device = next(model.parameters()).device
    own = product_tflops(device)  # first, as a warm-up
    pictures = [torch.randn(len(part), *shape, device=device) for part in torch.arange(images).split(250)]
    gpu = device.type == "cuda"
    grams = measured(lambda: urank.accumulate_grams(model, pictures[:4]), gpu)
    validation = urank.Validation.agreement(model, pictures)
    search = measured(lambda: urank.search_ranks(model, grams.result, validation, tolerance=0.1), gpu)
    probes = len(search.result.probes)
    rate = probes * images / search.seconds
    return dict(
        part="whole search",
        what=what,
        layers=len(grams.result),
        images=images,
        probes=probes,
        failed=sum(not probe.passed for probe in search.result.probes),
        seconds=round(search.seconds, 1),
        grams_seconds=round(grams.seconds, 1),
        images_per_second=round(rate),
        tflops=float(f"{2e-12 * urank.count_cost(model, shape).macs * rate:.3g}"),
        device_tflops=float(f"{own:.3g}"),  # far below 0.01 on a slow CPU
        peak_mib=search.peak >> 20,
        device=describe(device),
        hours_for_50000=round(search.seconds / 3600 * 50000 / images, 2),
        paper_gpu_hours=60,
    )


def product_tflops(device: torch.device) -> float:
    """Return the TFLOP/s of `device` for a product of two large square matrices in bfloat16."""
    side = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    took = Timer("a @ b", globals=dict(a=a, b=b), num_threads=torch.get_num_threads()).blocked_autorange().median
    return 2e-12 * side**3 / took


def memory_part(images: int | None, networks: Sequence[str] = ("vgg19", "resnet18", "resnet101")) -> Iterator[dict]:
    """Compare evaluation and training on the CPU while freed memory is returned to the system or kept.

    Each row needs its own process, because the setting of the C library cannot be undone.
    """
    for name, work in product(networks, (evaluation_work, training_work)):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            row = fresh.submit(memory_row, name, work, images or 1280).result()
        if row is None:
            typer.echo("skipping memory: only glibc can keep freed memory", err=True)
            return
        yield row


def memory_row(name: str, work: Callable, images: int) -> dict | None:
    """Return images/s for both settings, medians of three; None if freed memory cannot be kept."""
    what, rate = work(name, images)
    given_back = median(rate() for _ in range(3))
    if not urank.keep_freed_memory():
        return None
    kept = median(rate() for _ in range(3))
    ratio = round(kept / given_back, 2)
    return dict(part="memory", what=what, given_back=round(given_back), kept=round(kept), ratio=ratio)


def evaluation_work(name: str, images: int) -> tuple[str, Callable[[], float]]:
    """Return a description of the work, and a function that does it and returns images/s."""
    model = urank.create(name).to(memory_format=torch.channels_last)
    batch = torch.randn(min(images, 256), 3, 32, 32).contiguous(memory_format=torch.channels_last)
    what = f"{name}, evaluation, {len(batch)} images in float32"
    return what, lambda: images_per_second({name: model}, batch, seconds=1)[name]


def training_work(name: str, images: int) -> tuple[str, Callable[[], float]]:
    device, digits = torch.device("cpu"), datasets.load("digits10", train=images, test=100)
    recipe = replace(profiles.load_profile("cifar").find(f"cifar10/{name}").train, epochs=2)
    what = f"{name}, training, {recipe.batch_size} images in {arithmetic(device, recipe.precision)}"
    return what, partial(pace, name, digits, recipe, device)


def delve_part(images: int | None) -> list[dict]:
    """Compare delve's layer saturation with Gram matrices of the inputs, on the same network and images.

    delve sums the covariance of the outputs (m x m). Our matrices are d x d, and those of the outputs follow from them.
    """
    try:
        from delve import SaturationTracker
    except ImportError as error:
        typer.echo(f"skipping delve: {error}", err=True)
        return []
    model = urank.create("vgg11").eval()
    batches = list(torch.randn(images or 512, 3, 32, 32).split(64))

    logging.getLogger("delve").setLevel(logging.WARNING)

    def saturation() -> None:
        tracker = SaturationTracker("unused", save_to="print", modules=model, stats=["lsat"], device="cpu")
        with torch.no_grad():
            for batch in batches:
                model(batch)
        tracker.add_saturations(save=False)
        tracker.close()

    slow, fast = measured(saturation), measured(lambda: urank.accumulate_grams(model, batches))
    return [row("delve", "vgg11, outputs alone against inputs and outputs", slow, fast, same=False)]


PARTS = {
    "vgg11": lambda images: search_part("vgg11", images),
    "resnet18": lambda images: search_part("resnet18", images),
    "deit": lambda images: search_part("deit", images),
    "grams": grams_part,
    "scaling": scaling_part,
    "training": training_part,
    "memory": memory_part,
    "gpu-training": gpu_training_part,
    "vit": vit_part,
    "delve": delve_part,
}


def rows_in(path: Path) -> list[dict]:
    """Return the rows that were measured before."""
    return read_json(path)["rows"] if path.exists() else []


def measured_here(part: str) -> dict:
    """Return the columns that tell which part a row belongs to, and where it was measured."""
    return dict(only=part, device=describe(torch.device("cpu")), torch=torch.__version__)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}. Repeatable.")] = None,
    images: Annotated[int | None, typer.Option(help="Number of images; each part has a default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file of the results.")] = OUT,
) -> None:
    """Measure, print a table of ratios, and write each row with the hardware it was measured on.

    Rows of parts that are not run stay in the file.
    """
    unknown = set(only or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    names = only or list(PARTS)
    earlier = rows_in(out)
    rows: list[dict] = []
    for name in names:
        where = measured_here(name)
        for row in PARTS[name](images):
            rows.append(where | row)
            measured_now = {row["only"] for row in rows}
            write_json(out, dict(rows=[row for row in earlier if row["only"] not in measured_now] + rows))
    typer.echo(pd.DataFrame(rows).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    typer.run(main)
