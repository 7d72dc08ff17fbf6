import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from urank import conv_gram
from urank.conv_gram import assemble_gram, patch_gram, patch_products

MODES = ["zeros", "reflect", "replicate", "circular"]


def unfolded_gram(conv, images):
    """X^T X, from X."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(images.double(), conv._reversed_padding_repeated_twice, mode)
    X = F.unfold(padded, conv.kernel_size, conv.dilation, stride=conv.stride).transpose(1, 2).flatten(0, 1)
    return X.T @ X


def integer_images(*shape):
    """Images of small integers: their Gram matrices are exact in float64 and can be compared bit by bit."""
    return torch.randint(-9, 10, shape).float()


def force(patch, algorithm):
    """Use one of the two algorithms wherever it applies, whatever it costs."""

    def shares(c, rows, columns):
        return algorithm == "shared" and (rows.stride, columns.stride) == (1, 1)

    patch.setattr(conv_gram, "shares_terms", shares)


@pytest.fixture(params=["shared", "unfolded"])
def forced_algorithm(request, monkeypatch):
    force(monkeypatch, request.param)


def pair(values):
    return st.tuples(values, values)


@st.composite
def convolutions(draw):
    padding = draw(st.one_of(pair(st.integers(0, 4)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(st.one_of(st.just((1, 1)), pair(st.integers(1, 3))))
    c, kernel, dilation = draw(st.integers(1, 3)), draw(pair(st.integers(1, 4))), draw(pair(st.integers(1, 3)))
    return nn.Conv2d(c, 2, kernel, stride, padding, dilation, padding_mode=draw(st.sampled_from(MODES)))


@pytest.mark.parametrize("algorithm", ["shared", "unfolded", "cheaper"])
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(conv=convolutions(), n=st.integers(1, 3), size=pair(st.integers(1, 9)), seed=st.integers(0, 99))
def test_equals_unfold_for_every_convolution(algorithm, conv, n, size, seed):
    torch.manual_seed(seed)
    images = integer_images(n, conv.in_channels, *size)
    with pytest.MonkeyPatch.context() as patch:
        if algorithm != "cheaper":
            force(patch, algorithm)
        try:
            conv(images)
        except RuntimeError:
            with pytest.raises((ValueError, RuntimeError)):
                patch_gram(conv, images)
        else:
            gram = patch_gram(conv, images)
            assert gram.dtype == torch.float64 and torch.equal(gram, unfolded_gram(conv, images))


@pytest.mark.parametrize(("c", "size", "n"), [(64, 16, 2), (128, 8, 3), (16, 4, 300), (48, 2, 20)])
def test_equals_unfold_up_to_rounding(forced_algorithm, c, size, n):
    conv, images = nn.Conv2d(c, 2, 3, padding=1), torch.randn(n, c, size, size)
    expected = unfolded_gram(conv, images)
    assert (patch_gram(conv, images) - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("stride", [1, 2])
def test_has_the_order_of_the_weights(forced_algorithm, stride):
    conv = nn.Conv2d(3, 5, (3, 2), stride, padding=1, bias=False).double()
    images = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    Y, W = conv(images).transpose(0, 1).flatten(1).T, conv.weight.flatten(1).T
    torch.testing.assert_close(W.T @ patch_gram(conv, images) @ W, Y.T @ Y, rtol=1e-12, atol=1e-12)


def test_is_symmetric_and_positive_semidefinite(forced_algorithm):
    conv, images = nn.Conv2d(6, 2, 3, padding=1), torch.randn(2, 6, 3, 3)  # 18 patches of 54 numbers
    gram = patch_gram(conv, images)
    torch.testing.assert_close(gram, gram.T, rtol=1e-14, atol=1e-13)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    assert eigenvalues[-18] > 1e-6 * eigenvalues[-1]  # its rank is the number of patches
    assert eigenvalues[:-18].abs().max() < 1e-12 * eigenvalues[-1]


def test_sums_over_batches_give_the_gram_matrix_of_all_images(forced_algorithm):
    conv, images = nn.Conv2d(3, 2, 3, padding=1), integer_images(7, 3, 6, 5)
    products = sum(patch_products(conv, batch) for batch in images.split(3))
    assert torch.equal(assemble_gram(conv, (6, 5), products), patch_gram(conv, images))


def test_accepts_any_memory_layout_and_an_empty_batch(forced_algorithm):
    conv, images = nn.Conv2d(3, 2, 3, padding=1), integer_images(4, 3, 6, 5).requires_grad_()
    gram = patch_gram(conv, images.to(memory_format=torch.channels_last))
    assert not gram.requires_grad
    assert torch.equal(gram, patch_gram(conv, images))
    assert torch.equal(patch_gram(conv, images[:0]), torch.zeros(27, 27, dtype=torch.float64))


def test_large_inputs_are_processed_in_blocks(forced_algorithm, monkeypatch):
    monkeypatch.setattr(conv_gram, "ROW_BLOCK", 30)
    monkeypatch.setattr(conv_gram, "COLUMN_BLOCK", 5)
    conv, images = nn.Conv2d(3, 2, 3), integer_images(2, 3, 9, 7)
    assert torch.equal(patch_gram(conv, images), unfolded_gram(conv, images))


@pytest.mark.parametrize(
    ("c", "kernel", "stride", "size", "shares"),
    [
        *[(c, 3, 1, size, True) for c, size in [(64, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2)]],
        (512, 1, 1, 8, False),
        (64, 3, 2, 16, False),
        (3, 7, 2, 224, False),
    ],
)
def test_shares_terms_where_it_is_cheaper(c, kernel, stride, size, shares):
    conv = nn.Conv2d(c, 1, kernel, stride, padding=kernel // 2)
    assert conv_gram.shares_terms(c, *conv_gram.axes(conv, (size, size))) == shares


@pytest.mark.parametrize("padding", [0, 1])
def test_every_term_is_computed_once(padding):
    """Two taps at distance a share 16 - a rows or columns; half of all distances and the distance 0 count."""
    rows, columns = conv_gram.axes(nn.Conv2d(1, 1, 3, padding=padding), (16, 16))
    terms = sum(row.terms * column.terms for row, column in conv_gram.distances(rows, columns))
    assert terms == ((14 + 15 + 16 + 15 + 14) ** 2 + 16 * 16) / 2


def test_float32_products_never_use_tf32(forced_algorithm, tf32_allowed, monkeypatch):
    settings_seen = set()

    def spy(multiply):
        def spied(A, B):
            precision = torch.backends.cuda.matmul.fp32_precision
            settings_seen.add((A.dtype, precision, torch.is_autocast_enabled("cpu")))
            return multiply(A, B)

        return spied

    conv, images = nn.Conv2d(4, 2, 3, padding=1), torch.randn(3, 4, 8, 8)
    expected = unfolded_gram(conv, images)
    with monkeypatch.context() as patched, torch.autocast("cpu", dtype=torch.bfloat16):
        patched.setattr(torch, "bmm", spy(torch.bmm))
        patched.setattr(torch.Tensor, "__matmul__", spy(torch.Tensor.__matmul__))
        gram = patch_gram(conv, images, product_dtype=torch.float32)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert settings_seen - {(torch.float64, "ieee", False)} == {(torch.float32, "ieee", False)}
    assert gram.dtype == torch.float64
    assert 0 < (gram - expected).abs().max() < 1e-5 * expected.abs().max()


def test_errors_say_what_is_wrong():
    images = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="2 groups"):
        patch_gram(nn.Conv2d(4, 4, 3, groups=2), images)
    with pytest.raises(ValueError, match=r"\(n, 3, h, w\), got \(2, 4, 5, 5\)"):
        patch_gram(nn.Conv2d(3, 4, 3), images)
    with pytest.raises(ValueError, match=r"must be \(n, 4, h, w\)"):
        patch_gram(nn.Conv2d(4, 4, 3), images[0])
    for conv in (nn.Conv2d(4, 4, (6, 1)), nn.Conv2d(4, 4, 3, dilation=3), nn.Conv2d(4, 4, (1, 6), stride=2)):
        with pytest.raises(ValueError, match="smaller than the kernel"):
            patch_gram(conv, images)
