"""The Gram matrix of a convolution's input patches, exactly, without the patches.

A convolution is Y = X W on rows X of flattened patches; a row per output position t, a column per channel c and tap u.
Along one axis, tap i reads the input at u = i * dilation - padding, and at stride s

    G[(c, u), (c', u')] = sum_t P[c, u + s t] P[c', u' + s t].

Write u = r + s k with 0 <= r < s: the tap sees the phase P_r[q] = P[r + s q], which is an image of its own, and with
the lag l = k' - k

    G[(c, u), (c', u')] = sum_q P_r[c, q] P_r'[c', q + l],    q in the window k, ..., k + outputs - 1.

So tap pairs with equal (r, r', l) add up the same terms, over windows that differ near the borders only: nine by nine
pairs of taps of a 3 x 3 kernel have 25 lags, 13 up to symmetry. Where the windows begin and end cuts the axis into
segments; every term is multiplied once, in its segment, and a window is the sum of the segments inside it. In two
dimensions windows are rectangles and segments are cells, the products of those of the axes.

Zeros outside the image add nothing, so zero padding is never stored: it clips the windows to where both taps see the
image. Every other padding is written out first.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Interval = tuple[int, int]  # start, stop


class Lag(NamedTuple):
    """The tap pairs (i, i') of one axis that share their terms.

    Fields:
        apart: i' - i.
        phases: (r, r').
        shift: l, the lag on the phases.
        windows: for each pair, the interval of q it sums over.
    """

    apart: int
    phases: tuple[int, int]
    shift: int
    windows: dict[tuple[int, int], Interval]

    def distinct(self) -> list[Interval]:
        return sorted(set(self.windows.values()))

    def segments(self) -> list[Interval]:
        """What the ends of the windows cut the axis into, less the gaps that no window covers."""
        windows = self.distinct()
        pieces = pairwise(sorted({end for window in windows for end in window}))
        return [piece for piece in pieces if any(covers(window, piece) for window in windows)] or [(0, 0)]

    def membership(self) -> Tensor:
        """(distinct windows, segments): 1 where the window covers the segment."""
        rows = [[float(covers(window, piece)) for piece in self.segments()] for window in self.distinct()]
        return torch.tensor(rows, dtype=torch.float64)


def covers(window: Interval, piece: Interval) -> bool:
    return window[0] <= piece[0] and piece[1] <= window[1]


def axis_lags(size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]) -> list[Lag]:
    outputs = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    if outputs < 1:
        raise ValueError(f"an input of {size} with padding {padding} is smaller than the kernel, {kernel} taps")
    groups = defaultdict(dict)
    for i, j in product(range(kernel), repeat=2):
        (k, r), (m, q) = (divmod(tap * dilation - padding[0], stride) for tap in (i, j))
        start = max(k, 0, k - m)
        stop = min(k + outputs, len(range(r, size, stride)), len(range(q, size, stride)) - (m - k))
        groups[j - i, (r, q), m - k][i, j] = (start, stop) if start < stop else (0, 0)
    return [Lag(*key, windows) for key, windows in groups.items()]


def half_plane(conv, height, width) -> list[tuple[Lag, Lag]]:
    left, right, top, bottom = stored_padding(conv)[1]
    arguments = zip((height, width), conv.kernel_size, conv.stride, conv.dilation, ((top, bottom), (left, right)))
    rows, columns = (axis_lags(*axis) for axis in arguments)
    return [(row, column) for row, column in product(rows, columns) if (row.apart, column.apart) >= (0, 0)]


def stored_padding(conv):
    padding = tuple(conv._reversed_padding_repeated_twice)
    return ((0, 0, 0, 0), padding) if conv.padding_mode == "zeros" else (padding, (0, 0, 0, 0))


def window_products(phases, row: Lag, column: Lag) -> Tensor:
    left, right = (phases[r, s] for r, s in zip(row.phases, column.phases))
    c = left.shape[-1]
    cells = []
    for (top, bottom), (start, stop) in product(row.segments(), column.segments()):
        A = left[top:bottom, start:stop].flatten(1, 2)
        B = right[top + row.shift : bottom + row.shift, start + column.shift : stop + column.shift].flatten(1, 2)
        cells.append(torch.bmm(A.mT, B).sum(0, dtype=torch.float64))
    membership = torch.kron(row.membership(), column.membership()).to(left.device)
    return (membership @ torch.stack(cells).flatten(1)).view(-1, c, c)


def tap_products(conv, images, product_dtype=torch.float64):
    stored, _ = stored_padding(conv)
    if any(stored):
        images = F.pad(images, stored, conv.padding_mode)
    h, w = images.shape[2:]
    pixels = images.permute(2, 3, 0, 1)
    sh, sw = conv.stride
    phases = {(r, s): pixels[r::sh, s::sw].to(product_dtype).contiguous() for r, s in product(range(sh), range(sw))}
    return torch.cat([window_products(phases, row, column) for row, column in half_plane(conv, h, w)])


def assemble(conv, h, w, products):
    c = conv.in_channels
    G = products.new_empty(*conv.kernel_size, *conv.kernel_size, c, c)
    blocks = iter(products)
    for row, column in half_plane(conv, h, w):
        block = {windows: next(blocks) for windows in product(row.distinct(), column.distinct())}
        for (i, I), (j, J) in product(row.windows, column.windows):
            B = block[row.windows[i, I], column.windows[j, J]]
            G[i, j, I, J] = B
            G[I, J, i, j] = B.T
    return G.permute(4, 0, 1, 5, 2, 3).reshape(c * G[0, 0, ..., 0, 0].numel(), -1)


def patch_gram(conv, images, product_dtype=torch.float64):
    stored, _ = stored_padding(conv)
    h, w = images.shape[2] + stored[2] + stored[3], images.shape[3] + stored[0] + stored[1]
    return assemble(conv, h, w, tap_products(conv, images, product_dtype))
