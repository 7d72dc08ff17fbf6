"""Synthetic data sets: scikit-learn's handwritten digits, rendered onto small colour images."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from urank.datasets.images import Dataset, from_arrays

CLASSES = {"digits10": 10, "digits100": 100}
SIDE = 32  # height and width of an image, in pixels
CHUNK = 1000  # images drawn at a time, to limit memory


def draw_digits(name: str, train: int = 6000, test: int = 2000, seed: int = 0, plain: bool = False) -> Dataset:
    """Return 32 x 32 images of scikit-learn's handwritten digits (8 x 8) with random positions, sizes and colours.

    "digits10" shows one digit per image. "digits100" shows two, tens on the left and units on the right, and is harder.
    Training and test images never show the same handwritten digit, for any seeds. Every `classes` consecutive images
    contain each class once, so a subset from the front is balanced. Train with `Recipe(flip=False)`, because a mirrored
    digit is not a digit.

    Args:
        name: "digits10" or "digits100".
        train, test: numbers of images, at least one per class.
        seed: seed of all random numbers. Training images do not depend on `test`, and test images not on `train`.
        plain: draw white digits on black with fixed positions and sizes. This is easier for networks that need many
            images to learn invariance to colour and position, such as transformers.

    Raises:
        ValueError: there are fewer images than classes.
    """
    from sklearn.datasets import load_digits  # scikit-learn is slow to import, and only needed for the digits

    classes = CLASSES[name]
    if min(train, test) < classes:
        raise ValueError(f"{name}: {train} training and {test} test images cannot contain each of {classes} classes")
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
    """Return the indices of the handwritten digits for training (3/4 of each class) and test images (1/4).

    The split does not depend on the seed or the data set, so a network trained on one can be tested on another.
    """
    from sklearn.model_selection import train_test_split  # imported here for the same reason as `load_digits`

    indices = torch.arange(len(digits))
    train, test = train_test_split(indices.numpy(), test_size=0.25, stratify=digits.numpy(), random_state=0)
    return indices[train], indices[test]


def balanced_labels(classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Return labels (count,), int64: random permutations of all classes, one after another."""
    rounds = -(-count // classes)
    return torch.rand(rounds, classes, generator=generator).argsort(1).flatten()[:count]


def draw_scenes(
    labels: Tensor, classes: int, glyphs: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Return uint8 images (n, 32, 32, 3) of labels (n,), drawn with the handwritten digits in `pool`.

    Args:
        glyphs: all handwritten digits (s, 8, 8), ink from 0 to 1.
        digits: their values (s,), 0 to 9.
        pool: indices of the handwritten digits that may be used.
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
    """Return images as `draw_scenes` does, but white on black, each digit with its mean position and mean size."""
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
    """Return, per digit of an image, its values (n,), the range of its centre x and the range of its size (pixels)."""
    if classes == 10:
        return [(labels, (12, 20), (20, 30))]
    return [(labels // 10, (7.5, 10), (17, 23)), (labels % 10, (22, 24.5), (17, 23))]


def choose_sources(shown: Tensor, digits: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    """Return the index (n,) of a random handwritten digit from `pool` for each value in `shown` (n,)."""
    ordered = pool[digits[pool].argsort(stable=True)]
    counts = digits[pool].bincount(minlength=10)
    nth = (torch.rand(len(shown), generator=generator) * counts[shown]).long()
    return ordered[(counts.cumsum(0) - counts)[shown] + nth]


def draw_ink(glyphs: Tensor, x: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """Return the ink (n, 1, 32, 32), 0 to 1, of glyphs (n, 8, 8) drawn with centre x (n,) and side `size` (n,)."""
    n = len(glyphs)
    angle, slant = uniform(n, -0.2, 0.2, generator), uniform(n, -0.2, 0.2, generator)
    y = SIDE / 2 + (SIDE - size) / 2 * uniform(n, -0.9, 0.9, generator)
    # Map a pixel of the image to a point of the glyph, both in -1..1: move the centre to 0, rotate, slant, scale.
    turn = torch.stack([angle.cos(), angle.sin() + slant, -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    zoom = turn * (SIDE / size).view(n, 1, 1)
    shift = -zoom @ (torch.stack([x, y], 1) / (SIDE / 2) - 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([zoom, shift], 2), [n, 1, SIDE, SIDE], align_corners=False)
    fine = F.interpolate(glyphs.unsqueeze(1), (SIDE, SIDE), mode="bicubic")
    soft = F.grid_sample(fine, grid, align_corners=False)
    # Enlarged 8 x 8 pixels are blurred: a steep threshold makes strokes of random width.
    return torch.sigmoid(14 * (soft - uniform(n, 0.35, 0.55, generator).view(n, 1, 1, 1)))


def draw_backgrounds(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return backgrounds (n, 3, 32, 32), clouds of two similar colours, and their mean lightness (n,), 0 to 1."""
    dark = uniform(n, 0.12, 0.38, generator)
    lightness = torch.where(torch.rand(n, generator=generator) < 0.5, dark, 1 - dark)
    one, other = (colour(lightness + uniform(n, -0.1, 0.1, generator), generator) for _ in range(2))
    sharpness = uniform(n, 0, 2, generator).exp2().view(n, 1, 1, 1) * 2
    clouds = torch.sigmoid(sharpness * (noise(n, 4, generator) + 0.5 * noise(n, 11, generator)))
    return torch.lerp(one, other, clouds), lightness


def noise(n: int, cells: int, generator: torch.Generator) -> Tensor:
    """Return smooth noise (n, 1, 32, 32) with about `cells` bumps along each side."""
    coarse = torch.randn(n, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")


def contrasting_colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Return colours (n, 3, 1, 1) much lighter than a dark background and much darker than a light one."""
    step = uniform(len(lightness), 0.38, 0.58, generator)
    return colour(torch.where(lightness < 0.5, lightness + step, lightness - step), generator)


def colour(lightness: Tensor, generator: torch.Generator) -> Tensor:
    """Return colours (n, 3, 1, 1) of random hue with this lightness (n,), 0 to 1."""
    tint = torch.rand(len(lightness), 3, generator=generator) * 0.7
    weights = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue in the lightness (Rec. 601)
    return (tint + (lightness - tint @ weights).unsqueeze(1)).view(-1, 3, 1, 1).clamp(0, 1)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return n uniform random numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(n, generator=generator)
