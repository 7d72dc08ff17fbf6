"""The Gram matrix of a convolution's input patches, exactly, without writing the patches out.

A convolution is Y = X W on rows X of flattened patches: a row per output position t, a column per channel c and tap.
Along one axis, tap i reads the input from u = i * dilation - padding on, so at stride 1

    G[(c, i), (c', i')] = sum_t P[c, u + t] P[c', u' + t] = sum_q P[c, q] P[c', q + (u' - u)],   u <= q < u + outputs.

Tap pairs equally far apart add up the same terms, over windows of q that differ near the borders only: the 81 pairs of
a 3 x 3 kernel have 25 distances, 13 up to symmetry. The ends of the windows cut the axis into segments; every term is
multiplied once, in its segment, and a window is the sum of its segments. In two dimensions windows are rectangles and
segments are cells, the products of those of the two axes.

Zeros around the image add nothing, so zero padding is not stored: it clips the windows to where both taps are inside.
Other paddings are written out first. Strides leave few terms to share: there, and wherever sharing costs more than it
saves, X is built some output positions at a time and the upper half of X^T X summed.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from urank.layers import pad
from urank.numerics import full_precision

Interval = tuple[int, int]  # start, stop

BLOCK = 128  # columns of X multiplied at once: fewer waste less below the diagonal, more take less time each
SAMPLES = 4096  # rows of X held at once, or those of one row of output positions where these are more
READ = 16  # what reading a number costs, in multiplications: it makes products of thin matrices slow


def patch_gram(conv: nn.Conv2d, images: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """X^T X of the convolution's flattened input patches X, in the column order of `conv.weight.flatten(1)`.

    Writing the matrix can take longer than computing it: over batches of one image size, sum their `patch_products`
    and call `assemble_gram` once.

    Args:
        conv: any kernel size, stride, dilation, padding and padding mode; one group.
        images: (n, c, h, w), what `conv` takes.
        product_dtype: torch.float32 multiplies in float32 (never TF32) and sums the products' results in float64,
            for hardware whose float64 is slow.

    Returns:
        (d, d), float64, symmetric up to rounding, d = c * k_h * k_w.

    Raises:
        ValueError: more groups than one; images that do not fit `conv`, or are smaller than its kernel.

    Example:
        >>> patch_gram(nn.Conv2d(1, 8, (1, 2)), torch.tensor([[[[1.0, 2.0, 3.0]]]])).tolist()  # X: 1 2, 2 3
        [[5.0, 8.0], [8.0, 13.0]]
    """
    return assemble_gram(conv, images.shape[2:], patch_products(conv, images, product_dtype))


@torch.no_grad()
def patch_products(conv: nn.Conv2d, images: Tensor, product_dtype: torch.dtype = torch.float64) -> Tensor:
    """What `assemble_gram` makes the Gram matrix from; a sum over images, as the matrix is. Arguments: `patch_gram`'s.

    Returns:
        float64: (blocks, c, c), the distinct blocks of the matrix, or (d, d), its upper half.
    """
    if conv.groups != 1:
        raise ValueError(f"a convolution in {conv.groups} groups has no one patch matrix: groups must be 1")
    if images.ndim != 4 or images.shape[1] != conv.in_channels:
        raise ValueError(f"images must be (n, {conv.in_channels}, h, w), not {tuple(images.shape)}")
    rows, columns = axes(conv, images.shape[2:])
    shared = shares_terms(conv.in_channels, rows, columns)
    if conv.padding_mode != "zeros" or not shared:
        images = pad(conv, images)
    # (c, h, w, n): in every channel, what a run of columns holds of all images is contiguous
    pixels = images.flatten(1).T.contiguous().to(product_dtype).unflatten(0, images.shape[1:])
    with full_precision(images.device):
        return shared_products(pixels, rows, columns) if shared else unfolded_products(pixels, rows, columns)


def assemble_gram(conv: nn.Conv2d, size: tuple[int, int], products: Tensor) -> Tensor:
    """X^T X (d, d) from the `patch_products` of images of one size, (h, w)."""
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
    """The tap pairs (i, i + apart) of one axis, in which P[q] meets P[q + shift]."""

    apart: int
    shift: int
    windows: dict[int, Interval]  # for each i, the q it sums over

    @property
    def distinct(self) -> list[Interval]:
        return sorted(set(self.windows.values()))

    @property
    def segments(self) -> list[Interval]:
        """The pieces between the ends of the windows that some window covers; one empty piece if there are none."""
        pieces = pairwise(sorted({end for window in self.distinct for end in window}))
        return [piece for piece in pieces if any(covers(window, piece) for window in self.distinct)] or [(0, 0)]

    @property
    def terms(self) -> int:
        return sum(stop - start for start, stop in self.segments)

    def membership(self) -> Tensor:
        """(distinct windows, segments): 1 where the window covers the segment."""
        rows = [[covers(window, piece) for piece in self.segments] for window in self.distinct]
        return torch.tensor(rows, dtype=torch.float64)


def covers(window: Interval, piece: Interval) -> bool:
    return window[0] <= piece[0] and piece[1] <= window[1]


class Axis(NamedTuple):
    """A convolution along one axis."""

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: Interval  # zeros before and after the image, which are not stored

    @property
    def outputs(self) -> int:
        return (self.size + sum(self.padding) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def distance(self, apart: int) -> Distance:
        """At stride 1."""
        shift, windows = apart * self.dilation, {}
        for i in range(max(0, -apart), min(self.kernel, self.kernel - apart)):
            u = i * self.dilation - self.padding[0]
            start, stop = max(u, 0, -shift), min(u + self.outputs, self.size, self.size - shift)
            windows[i] = (start, stop) if start < stop else (0, 0)
        return Distance(apart, shift, windows)


def axes(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """The rows and the columns of images of `size`; paddings other than zeros count as image."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    size, paddings = tuple(size), [(top, bottom), (left, right)]
    if conv.padding_mode != "zeros":
        size, paddings = (size[0] + top + bottom, size[1] + left + right), [(0, 0), (0, 0)]
    rows, columns = map(Axis, size, conv.kernel_size, conv.stride, conv.dilation, paddings)
    if rows.outputs < 1 or columns.outputs < 1:
        raise ValueError(f"images of {size} with zero padding {paddings} are smaller than the kernel of {conv}")
    return rows, columns


def distances(rows: Axis, columns: Axis) -> Iterator[tuple[Distance, Distance]]:
    """Half of the plane of distances; the other half is its mirror image, G being symmetric."""
    for down, right in product(range(rows.kernel), range(1 - columns.kernel, columns.kernel)):
        if (down, right) >= (0, 0):
            yield rows.distance(down), columns.distance(right)


def shares_terms(c: int, rows: Axis, columns: Axis) -> bool:
    """Whether the shared products cost less an image than half of X^T X does, reads counted with multiplications."""
    if (rows.stride, columns.stride) != (1, 1):
        return False
    d = c * rows.kernel * columns.kernel
    shared = sum(row.terms * column.terms for row, column in distances(rows, columns)) * c * (c + 2 * READ)
    # X is gathered, written and read
    unfolded = rows.outputs * columns.outputs * d * ((d + min(d, BLOCK)) / 2 + 3 * READ)
    return shared < unfolded


def shared_products(pixels: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """pixels (c, h, w, n) -> (blocks, c, c): the distinct windows of all `distances`, in order."""
    return torch.cat([window_products(pixels, row, column) for row, column in distances(rows, columns)])


def window_products(pixels: Tensor, row: Distance, column: Distance) -> Tensor:
    """pixels (c, h, w, n) -> (distinct windows, c, c): for each, the sum over its q of P[:, q] P[:, q + shift]^T."""
    cells = []
    for (top, bottom), (start, stop) in product(row.segments, column.segments):
        A = pixels[:, top:bottom, start:stop]
        B = pixels[:, top + row.shift : bottom + row.shift, start + column.shift : stop + column.shift]
        A, B = (M.transpose(0, 1).flatten(2) for M in (A, B))  # (h, c, w n), still views of the pixels
        cells.append(torch.bmm(A, B.mT).sum(0, dtype=torch.float64))
    membership = torch.kron(row.membership(), column.membership()).to(pixels.device)
    return (membership @ torch.stack(cells).flatten(1)).unflatten(1, cells[0].shape)


def tap_blocks(products: Tensor, rows: Axis, columns: Axis) -> dict[tuple[int, int], Tensor]:
    """`shared_products` -> the block (c, c) of every pair of taps, taps numbered in the kernel's reading order."""
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
    """pixels (c, h, w, n), padded -> (d, d): X^T X on and above the diagonal."""
    device, d = pixels.device, len(pixels) * rows.kernel * columns.kernel
    y = torch.arange(rows.outputs, device=device) * rows.stride
    x = torch.arange(columns.outputs, device=device) * columns.stride
    i = torch.arange(rows.kernel, device=device)[:, None, None, None] * rows.dilation
    j = torch.arange(columns.kernel, device=device)[:, None, None] * columns.dilation
    G = pixels.new_zeros(d, d, dtype=torch.float64)
    for some in y.split(max(1, SAMPLES // max(1, len(x) * pixels.shape[3]))):
        X = pixels[:, i + some[:, None], j + x].flatten(3).flatten(0, 2)  # transposed: (d, samples)
        for a in range(0, d, BLOCK):
            G[a : a + BLOCK, a:] += X[a : a + BLOCK] @ X[a:].T
    return G
