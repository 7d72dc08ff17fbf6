"""Exact Gram matrix of a convolution's input patches, without building the matrix of patches.

A convolution is Y = X W, with one row of X per output position t and one column per channel c and kernel tap i. Along
one axis, tap i reads the input from position u = i * dilation - padding. At stride 1

    G[(c, i), (c', i')] = sum_t P[c, u + t] P[c', u' + t] = sum_q P[c, q] P[c', q + (u' - u)],   u <= q < u + outputs.

Tap pairs with the same distance u' - u sum the same terms; only their windows of q differ, near the borders. The 81 tap
pairs of a 3 x 3 kernel have 25 distances, 13 up to symmetry. The ends of the windows cut the axis into segments. Every
term is computed once, in its segment, and a window is the sum of its segments. In two dimensions windows are rectangles
and segments are rectangular cells.

Zero padding does not change the sums, so it is not stored: a window contains only the q for which both taps are inside
the image. For other padding modes the image is padded first. With strides, few terms are shared. Then, and wherever
sharing costs more than it saves, we build X for a block of output positions at a time and sum the upper half of X^T X.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from urank.layers import pad
from urank.numerics import full_precision

Interval = tuple[int, int]  # start, stop

COLUMN_BLOCK = 128  # columns of X multiplied at once; small blocks waste less work below the diagonal but are slower
ROW_BLOCK = 4096  # rows of X in memory at once, or all output positions of one image row if these are more
READ_COST = 16  # cost of reading a number, in multiplications: thin matrix products are limited by memory


def patch_gram(conv: nn.Conv2d, images: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """Return X^T X (d, d) of a convolution's flattened input patches, d = c * k_h * k_w, in float64.

    Columns are in the order of `conv.weight.flatten(1)`. Assembling the matrix can take longer than computing its
    terms: for many batches of the same image size, sum their `patch_products` and call `assemble_gram` once.

    Args:
        conv: convolution with one group and any kernel size, stride, dilation, padding and padding mode.
        images: input of `conv`, (n, c, h, w).
        product_dtype: precision of the products; torch.float32 (never TF32) for hardware with slow float64. Their sums
            are float64.

    >>> patch_gram(nn.Conv2d(1, 8, (1, 2)), torch.tensor([[[[1.0, 2.0, 3.0]]]])).tolist()  # patches (1, 2) and (2, 3)
    [[5.0, 8.0], [8.0, 13.0]]

    Raises:
        ValueError: the convolution has several groups, or the images do not fit it or are smaller than its kernel.
    """
    return assemble_gram(conv, images.shape[2:], patch_products(conv, images, product_dtype))


@torch.no_grad()
def patch_products(conv: nn.Conv2d, images: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the sums from which `assemble_gram` builds the Gram matrix; arguments and errors as for `patch_gram`.

    The products of several batches of images of the same size can be added.

    Returns:
        (blocks, c, c), the distinct blocks of the matrix, or (d, d), its upper half; float64.
    """
    if conv.groups != 1:
        raise ValueError(f"a convolution with {conv.groups} groups has several patch matrices: groups must be 1")
    if images.ndim != 4 or images.shape[1] != conv.in_channels:
        raise ValueError(f"images must be (n, {conv.in_channels}, h, w), got {tuple(images.shape)}")
    rows, columns = axes(conv, images.shape[2:])
    shared = shares_terms(conv.in_channels, rows, columns)
    if conv.padding_mode != "zeros" or not shared:
        images = pad(conv, images)
    # (c, h, w, n): within a channel, the pixels of all images in adjacent columns are contiguous
    pixels = images.flatten(1).T.contiguous().to(product_dtype).unflatten(0, images.shape[1:])
    with full_precision(images.device):
        return shared_products(pixels, rows, columns) if shared else unfolded_products(pixels, rows, columns)


def assemble_gram(conv: nn.Conv2d, size: Sequence[int], products: Tensor) -> Tensor:
    """Return X^T X (d, d) from the sum of `patch_products` of images of one size (h, w)."""
    rows, columns = axes(conv, size)
    if not shares_terms(conv.in_channels, rows, columns):
        return products.triu() + products.triu(1).T
    c, taps = conv.in_channels, rows.kernel * columns.kernel
    blocks = tap_blocks(products, rows, columns)
    G = products.new_empty(c, taps, c, taps)
    for u in range(taps):
        G[:, u] = torch.stack([blocks[u, v] for v in range(taps)]).permute(1, 2, 0)
    return G.flatten(2).flatten(0, 1)


class Distance(NamedTuple):
    """Tap pairs (i, i + apart) along one axis, which multiply P[q] by P[q + shift].

    Attributes:
        windows: for each i, the interval of q over which the pair sums.
    """

    apart: int
    shift: int
    windows: dict[int, Interval]

    @property
    def distinct(self) -> list[Interval]:
        """The different windows, in ascending order."""
        return sorted(set(self.windows.values()))

    @property
    def segments(self) -> list[Interval]:
        """The pieces between the ends of the windows that some window contains; one empty piece if there are none."""
        pieces = pairwise(sorted({end for window in self.distinct for end in window}))
        return [piece for piece in pieces if any(contains(window, piece) for window in self.distinct)] or [(0, 0)]

    @property
    def terms(self) -> int:
        """Number of q in all segments."""
        return sum(stop - start for start, stop in self.segments)

    def membership(self) -> Tensor:
        """Return a matrix (distinct windows, segments) with 1 if the window contains the segment, else 0."""
        rows = [[contains(window, piece) for piece in self.segments] for window in self.distinct]
        return torch.tensor(rows, dtype=torch.float64)


def contains(window: Interval, piece: Interval) -> bool:
    """Return True if the window contains the piece."""
    return window[0] <= piece[0] and piece[1] <= window[1]


class Axis(NamedTuple):
    """A convolution along one axis.

    Attributes:
        size: number of pixels.
        padding: number of zeros before and after the image; they are not stored.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: Interval

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return (self.size + sum(self.padding) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def distance(self, apart: int) -> Distance:
        """Return the tap pairs (i, i + apart) and their windows at stride 1."""
        shift, windows = apart * self.dilation, {}
        for i in range(max(0, -apart), min(self.kernel, self.kernel - apart)):
            u = i * self.dilation - self.padding[0]
            start, stop = max(u, 0, -shift), min(u + self.outputs, self.size, self.size - shift)
            windows[i] = (start, stop) if start < stop else (0, 0)
        return Distance(apart, shift, windows)


def axes(conv: nn.Conv2d, size: Sequence[int]) -> tuple[Axis, Axis]:
    """Return the vertical and the horizontal axis for images of `size` (h, w).

    With a padding mode other than zeros, the padding is part of the image.
    """
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    paddings = [(top, bottom), (left, right)]
    if conv.padding_mode != "zeros":
        size, paddings = (size[0] + top + bottom, size[1] + left + right), [(0, 0), (0, 0)]
    rows, columns = map(Axis, size, conv.kernel_size, conv.stride, conv.dilation, paddings)
    if rows.outputs < 1 or columns.outputs < 1:
        raise ValueError(f"images of {tuple(size)} with zero padding {paddings} are smaller than the kernel of {conv}")
    return rows, columns


def distances(rows: Axis, columns: Axis) -> Iterator[tuple[Distance, Distance]]:
    """Yield half of all pairs of distances (vertical, horizontal); the other half follows from the symmetry of G."""
    for down, right in product(range(rows.kernel), range(1 - columns.kernel, columns.kernel)):
        if (down, right) >= (0, 0):
            yield rows.distance(down), columns.distance(right)


def shares_terms(c: int, rows: Axis, columns: Axis) -> bool:
    """Return True if sharing terms is cheaper than computing half of X^T X; reads count as multiplications."""
    if (rows.stride, columns.stride) != (1, 1):
        return False
    d = c * rows.kernel * columns.kernel
    shared = sum(row.terms * column.terms for row, column in distances(rows, columns)) * c * (c + 2 * READ_COST)
    # each number of X is gathered, written and read
    unfolded = rows.outputs * columns.outputs * d * ((d + min(d, COLUMN_BLOCK)) / 2 + 3 * READ_COST)
    return shared < unfolded


def shared_products(pixels: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Return (blocks, c, c), the `window_products` of all `distances` in order, from pixels (c, h, w, n)."""
    return torch.cat([window_products(pixels, row, column) for row, column in distances(rows, columns)])


def window_products(pixels: Tensor, row: Distance, column: Distance) -> Tensor:
    """Return, for each distinct window, the sum over its q of P[:, q] P[:, q + shift]^T.

    Args:
        pixels: (c, h, w, n).

    Returns:
        (distinct windows, c, c).
    """
    cells = []
    for (top, bottom), (start, stop) in product(row.segments, column.segments):
        A = pixels[:, top:bottom, start:stop]
        B = pixels[:, top + row.shift : bottom + row.shift, start + column.shift : stop + column.shift]
        A, B = (M.transpose(0, 1).flatten(2) for M in (A, B))  # (h, c, w * n), views of the pixels
        cells.append(torch.bmm(A, B.mT).sum(0, dtype=torch.float64))
    membership = torch.kron(row.membership(), column.membership()).to(pixels.device)
    return (membership @ torch.stack(cells).flatten(1)).unflatten(1, cells[0].shape)


def tap_blocks(products: Tensor, rows: Axis, columns: Axis) -> dict[tuple[int, int], Tensor]:
    """Return the block (c, c) of every pair of taps from `shared_products`; taps are numbered in row-major order."""
    table, blocks = {}, iter(products)
    for row, column in distances(rows, columns):
        distinct = {windows: next(blocks) for windows in product(row.distinct, column.distinct)}
        for (i, row_window), (j, column_window) in product(row.windows.items(), column.windows.items()):
            u = i * columns.kernel + j
            v = u + row.apart * columns.kernel + column.apart
            table[u, v] = distinct[row_window, column_window]
            table[v, u] = table[u, v].T
    return table


def unfolded_products(pixels: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Return (d, d) with X^T X on and above the diagonal, from padded pixels (c, h, w, n)."""
    device, d = pixels.device, len(pixels) * rows.kernel * columns.kernel
    y = torch.arange(rows.outputs, device=device) * rows.stride
    x = torch.arange(columns.outputs, device=device) * columns.stride
    i = torch.arange(rows.kernel, device=device)[:, None, None, None] * rows.dilation
    j = torch.arange(columns.kernel, device=device)[:, None, None] * columns.dilation
    G = pixels.new_zeros(d, d, dtype=torch.float64)
    for some in y.split(max(1, ROW_BLOCK // max(1, len(x) * pixels.shape[3]))):
        X = pixels[:, i + some[:, None], j + x].flatten(3).flatten(0, 2)  # the transpose of X: (d, rows)
        for a in range(0, d, COLUMN_BLOCK):
            G[a : a + COLUMN_BLOCK, a:] += X[a : a + COLUMN_BLOCK] @ X[a:].T
    return G
