"""Handwritten digits that ship inside scikit-learn, drawn onto small scenes on the fly."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from urank.datasets.images import Dataset, from_arrays

CLASSES = {"digits10": 10, "digits100": 100}
SIDE = 32  # height and width of every scene, in pixels
CHUNK = 1000  # images drawn at a time, which bounds the memory


def draw_digits(name: str, train: int = 6000, test: int = 2000, seed: int = 0, plain: bool = False) -> Dataset:
    """Handwritten digits (scikit-learn's, 8 x 8) in random places, sizes and colours on 32 x 32 scenes.

    "digits10" shows one digit. "digits100" shows two, tens on the left and units on the right, so the same pixels make
    a harder data set. No handwritten digit is seen both in training and in test images, whatever the seeds. Every
    `classes` consecutive images hold each class once, so that a part taken from the front stays balanced. A mirrored
    digit is no digit: train with `Recipe(flip=False)`.

    Args:
        train, test: numbers of images, at least one a class.
        seed: of the drawing; the training images do not depend on `test`, nor the test images on `train`.
        plain: white digits on black, each in its place and of one size, as a scanner would leave them: for networks
            that take more images to learn what colour and place do not mean, such as transformers.

    Raises:
        ValueError: fewer images than classes.
    """
    from sklearn.datasets import load_digits  # takes a second, which only those who draw digits wait for

    classes = CLASSES[name]
    if min(train, test) < classes:
        raise ValueError(f"{name}: {train} training and {test} test images cannot show each of {classes} classes")
    sources, draw = load_digits(), draw_plain if plain else draw_scenes
    glyphs, digits = torch.from_numpy(sources.images).float() / 16, torch.from_numpy(sources.target)
    arrays = []
    for part, (pool, count) in enumerate(zip(split_sources(digits), (train, test))):
        state = np.random.SeedSequence([seed, classes, part]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        labels = balanced_labels(classes, count, generator)
        images = torch.cat([draw(some, classes, glyphs, digits, pool, generator) for some in labels.split(CHUNK)])
        arrays += [images.numpy(), labels.numpy()]
    return from_arrays(name, classes, *arrays)


def split_sources(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the handwritten digits that training and test images may show: 3/4 and 1/4 of each class.

    The split is the same for every seed and data set, so that a network trained on one can be tested on another.
    """
    from sklearn.model_selection import train_test_split

    indices = torch.arange(len(digits))
    train, test = train_test_split(indices.numpy(), test_size=0.25, stratify=digits.numpy(), random_state=0)
    return indices[train], indices[test]


def balanced_labels(classes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` labels (int64): one random order of all classes after another."""
    rounds = -(-count // classes)
    return torch.rand(rounds, classes, generator=generator).argsort(1).flatten()[:count]


def draw_scenes(
    labels: Tensor, classes: int, glyphs: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Images (n, 32, 32, 3), uint8, of `labels` (n,), drawn with the handwritten digits whose index is in `pool`.

    Args:
        glyphs, digits: all handwritten digits, (s, 8, 8) with ink from 0 to 1, and what they are, (s,).
    """
    canvas, lightness = draw_backgrounds(len(labels), generator)
    for shown, (left, right), (smallest, largest) in layout(labels, classes):
        chosen = choose_sources(shown, digits, pool, generator)
        size = uniform(len(labels), smallest, largest, generator)
        ink = draw_ink(glyphs[chosen], uniform(len(labels), left, right, generator), size, generator)
        canvas = torch.lerp(canvas, contrasting_colour(lightness, generator), ink)
    canvas = canvas + 0.03 * torch.randn(canvas.shape, generator=generator)
    return (255 * canvas.clamp(0, 1)).round().byte().permute(0, 2, 3, 1)


def draw_plain(
    labels: Tensor, classes: int, glyphs: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """As `draw_scenes`, white on black, each digit in the middle of the places and sizes that it may have there."""
    canvas = torch.zeros(len(labels), 1, SIDE, SIDE)
    for shown, (left, right), (smallest, largest) in layout(labels, classes):
        chosen = glyphs[choose_sources(shown, digits, pool, generator)]
        size, x = int((smallest + largest) / 2), (left + right) / 2
        fine = F.interpolate(chosen.unsqueeze(1), (size, size), mode="bilinear")
        top, start = (SIDE - size) // 2, max(0, round(x - size / 2))
        place = canvas[..., top : top + size, start : start + size]
        place.copy_(torch.maximum(place, fine[..., : place.shape[3]]))
    return (255 * canvas).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def layout(labels: Tensor, classes: int) -> list[tuple[Tensor, tuple[float, float], tuple[float, float]]]:
    """For each digit of a scene: which it is (n,), the range of its centre's x and that of its size, in pixels."""
    if classes == 10:
        return [(labels, (12, 20), (20, 30))]
    return [(labels // 10, (7.5, 10), (17, 23)), (labels % 10, (22, 24.5), (17, 23))]


def choose_sources(shown: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    """For each digit of `shown` (n,), the index (n,) of a handwritten one from `pool`, at random."""
    ordered = pool[digits[pool].argsort(stable=True)]
    counts = digits[pool].bincount(minlength=10)
    nth = (torch.rand(len(shown), generator=generator) * counts[shown]).long()
    return ordered[(counts.cumsum(0) - counts)[shown] + nth]


def draw_ink(glyphs: Tensor, x: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """How much ink (n, 1, 32, 32), 0 to 1, glyphs (n, 8, 8) leave when drawn at x with a side of `size` pixels."""
    n = len(glyphs)
    angle, slant = uniform(n, -0.2, 0.2, generator), uniform(n, -0.2, 0.2, generator)
    y = SIDE / 2 + (SIDE - size) / 2 * uniform(n, -0.9, 0.9, generator)
    # From a pixel of the scene to a place on the glyph, both in -1..1: move the centre to 0, turn, slant, magnify.
    turn = torch.stack([angle.cos(), angle.sin() + slant, -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    zoom = turn * (SIDE / size).view(n, 1, 1)
    shift = -zoom @ (torch.stack([x, y], 1) / (SIDE / 2) - 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([zoom, shift], 2), [n, 1, SIDE, SIDE], align_corners=False)
    fine = F.interpolate(glyphs.unsqueeze(1), (SIDE, SIDE), mode="bicubic")
    soft = F.grid_sample(fine, grid, align_corners=False)
    # 8 x 8 pixels enlarged are a blur: a steep threshold turns it back into a stroke, of varying width.
    return torch.sigmoid(14 * (soft - uniform(n, 0.35, 0.55, generator).view(n, 1, 1, 1)))


def draw_backgrounds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two-coloured clouds (n, 3, 32, 32) and the lightness (n,) around which both colours lie, in 0 to 1."""
    dark = uniform(n, 0.12, 0.38, generator)
    lightness = torch.where(torch.rand(n, generator=generator) < 0.5, dark, 1 - dark)
    one, other = (colour(lightness + uniform(n, -0.1, 0.1, generator), generator) for _ in range(2))
    sharpness = uniform(n, 0, 2, generator).exp2().view(n, 1, 1, 1) * 2
    clouds = torch.sigmoid(sharpness * (noise(n, 4, generator) + 0.5 * noise(n, 11, generator)))
    return torch.lerp(one, other, clouds), lightness


def noise(n: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (n, 1, 32, 32) of about `cells` bumps along each side."""
    coarse = torch.randn(n, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def contrasting_colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Colours (n, 3, 1, 1) well lighter than a dark `lightness` (n,) and well darker than a light one."""
    step = uniform(len(lightness), 0.38, 0.58, generator)
    return colour(torch.where(lightness < 0.5, lightness + step, lightness - step), generator)


def colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Colours (n, 3, 1, 1) of the given lightness (n,) and any hue, in about 0 to 1."""
    tint = torch.rand(len(lightness), 3, generator=generator) * 0.7
    weights = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue in how light a colour looks (Rec. 601)
    return (tint + (lightness - tint @ weights).unsqueeze(1)).view(-1, 3, 1, 1).clamp(0, 1)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)
