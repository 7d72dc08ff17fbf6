"""The picture on the method page: a layer with three inputs and three outputs, computed with the library.

The inputs are close to a plane. The weight is strong in one direction of this plane and in the direction that the data
hardly have. W therefore has full rank, while the data use one of its directions.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import urank
from urank import subspaces
from urank.reproduction.figures.style import COLORS, GREY, STYLE, WIDTH, closed

BLUE, ORANGE = COLORS[:2]  # the data, and what the projections make of them
K_S, K_T = 2, 1
VIEW = dict(elev=12, azim=-65)


def planted_layer() -> tuple[Tensor, Tensor]:
    """Return inputs X (120 x 3) close to a plane, and a weight W (3 x 3) of full rank."""
    torch.manual_seed(0)
    tilted = torch.tensor([[1, 0, 0], [0, 1, 0], [0.2, 0.4, 1]], dtype=torch.float64)
    skewed = torch.tensor([[1, 0, 0], [0.4, 1, 0], [0.6, 0, 1]], dtype=torch.float64)
    inputs, outputs = (torch.linalg.qr(directions)[0] for directions in (tilted, skewed))
    X = torch.randn(120, 3, dtype=torch.float64) * torch.tensor([1.0, 0.9, 0.15]) @ inputs.T
    return X, inputs @ torch.diag(torch.tensor([1.0, 0.25, 0.9], dtype=torch.float64)) @ outputs.T


def method_picture(X: Tensor, W: Tensor) -> Figure:
    """Draw X and S, Y and T, then W, W' and its two factors as matrices."""
    spectra = subspaces.layer_spectra(subspaces.gram_matrix(X), W)
    projected = urank.project_weight(W, *spectra, K_S, K_T)
    rank = urank.utilized_rank(projected)
    left, singular, right = torch.linalg.svd(projected)
    factors = left[:, :rank], singular[:rank, None] * right[:rank]
    with plt.rc_context(STYLE | {"grid.color": "#DDDDDD"}):
        figure = plt.figure(figsize=(WIDTH, 4.9), layout="constrained")
        clouds, matrices = figure.subfigures(2, 1, height_ratios=[3.1, 1.8])
        for number, spectrum, k, before, after in (
            (1, spectra[0], K_S, X, X @ urank.projector(spectra[0], K_S)),
            (2, spectra[1], K_T, X @ W, X @ projected),
        ):
            draw_cloud(clouds.add_subplot(1, 2, number, projection="3d"), before, after, spectrum.basis[:, :k])
        inputs, outputs = clouds.axes
        inputs.set_title("Inputs $X$, subspace $S$: a plane", y=0.98)
        outputs.set_title("Outputs $Y$, subspace $T$: a line", y=0.98)
        titles = (
            f"$W$\nrank {urank.utilized_rank(W)}",
            f"$W' = P_S W P_T$\nrank {rank}",
            f"$A$\n{factors[0].numel()} weights",
            f"$B$\n{factors[1].numel()} weights",
        )
        grid = matrices.subplots(1, 4, width_ratios=[3, 3, 1.4, 3])
        for axis, matrix, title, sign in zip(grid, (W, projected, *factors), titles, ("→", "=", "·", "")):
            draw_matrix(axis, matrix, W.abs().max().item())
            axis.set_title(title, loc="center")
            axis.text(1.12, 0.5, sign, transform=axis.transAxes, va="center", fontsize=16)
    return closed(figure)


def draw_cloud(axis: Axes, before: Tensor, after: Tensor, basis: Tensor) -> None:
    """Draw rows, their projections, and the subspace that `basis` (3 x 1 or 3 x 2) spans."""
    for start, end in zip(before, after):
        axis.plot(*zip(start, end), color=GREY, lw=0.8)
    axis.scatter(*before.T, s=12, color=BLUE, depthshade=False, lw=0)
    axis.scatter(*after.T, s=7, color=ORANGE, depthshade=False, lw=0)
    reach = 1.1 * (after @ basis).abs().amax(0)
    if basis.shape[1] == 1:
        axis.plot(*torch.stack([-reach * basis[:, 0], reach * basis[:, 0]], 1), color=ORANGE, lw=1.2)
    else:
        corners = torch.tensor([[[-1, -1], [-1, 1]], [[1, -1], [1, 1]]]) * reach @ basis.T
        axis.plot_surface(*corners.permute(2, 0, 1).numpy(), color=ORANGE, alpha=0.2)
    axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
    side = 1.05 * before.abs().max().item()
    axis.set(xlim=(-side, side), ylim=(-side, side), zlim=(-side, side))
    axis.set_box_aspect((1, 1, 1), zoom=1.12)
    axis.view_init(**VIEW)


def draw_matrix(axis: Axes, matrix: Tensor, limit: float) -> None:
    axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-2 * limit, vmax=2 * limit)  # light enough for the numbers
    for (row, column), value in zip(torch.cartesian_prod(*map(torch.arange, matrix.shape)).tolist(), matrix.flatten()):
        axis.text(column, row, f"{round(value.item(), 1) + 0:.1f}", ha="center", va="center", fontsize=11)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def save(path: Path | str) -> None:
    """Write the picture; the same file each time."""
    with plt.rc_context({"svg.hashsalt": "urank"}):
        method_picture(*planted_layer()).savefig(path, metadata={"Date": None})
