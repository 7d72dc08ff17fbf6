"""The picture on the method page."""

import re

import pytest
import torch

import urank
from urank.reproduction.figures import method_picture
from urank.reproduction.profiles import ROOT


@pytest.fixture(scope="module")
def figure():
    return method_picture.method_picture(*method_picture.planted_layer())


def matrices(figure):
    """The matrices that are drawn: W, W' and its factors."""
    return [torch.tensor(axis.images[0].get_array().data) for axis in figure.axes if axis.images]


def test_the_committed_picture_is_drawn_by_this_code(tmp_path):
    """Run `make book/method.svg` after a change of the picture."""
    method_picture.save(tmp_path / "method.svg")
    drawn, committed = ((folder / "method.svg").read_text() for folder in (tmp_path, ROOT / "book"))
    shapes, expected = ([float(number) for number in re.findall(r"-?\d+\.\d+", text)] for text in (drawn, committed))
    assert shapes == pytest.approx(expected, abs=1e-3)


def test_two_factors_replace_a_projected_weight_of_lower_rank(figure):
    W, projected, A, B = matrices(figure)
    assert torch.equal(W, method_picture.planted_layer()[1])
    assert (urank.utilized_rank(W), urank.utilized_rank(projected)) == (3, 1)
    torch.testing.assert_close(A @ B, projected)


def test_the_caption_states_what_is_drawn(figure):
    """The ranks and the numbers of weights in book/method.md."""
    W, projected, A, B = matrices(figure)
    page = " ".join((ROOT / "book" / "method.md").read_text().split())
    ranks = f"$W$ has rank {urank.utilized_rank(W)}. $W'$ has rank {urank.utilized_rank(projected)}, so two thin layers"
    assert ranks in page and f"{A.numel() + B.numel()} weights instead of {W.numel()}" in page


def test_the_projected_data_lie_in_a_plane_and_on_a_line(figure):
    inputs, outputs = (axis.collections for axis in figure.axes if not axis.images)
    for (cloud, projected), dimension in (((inputs[0], inputs[1]), 2), ((outputs[0], outputs[1]), 1)):
        before, after = (torch.stack([torch.tensor(one) for one in part._offsets3d]) for part in (cloud, projected))
        assert torch.linalg.matrix_rank(before) == 3
        assert torch.linalg.matrix_rank(after, rtol=1e-6) == dimension
