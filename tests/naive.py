"""A slow, literal second implementation of the mathematics, to check the package against.

Written from the specification alone. A layer is a matrix W (d x m) that acts on rows, Y = X W: for a
convolution X holds the flattened patches (d = c_in k_h k_w), one row per output position. Uncentred, no bias.
"""

import copy
from collections import OrderedDict
from fractions import Fraction
from math import floor

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def weight_matrix(layer):
    """W in float64, (d, m); a copy, since a float64 weight would be shared."""
    weight = layer.weight.detach()
    return weight.reshape(weight.shape[0], -1).T.double().numpy().copy()


def set_weight_matrix(layer, W):
    """Cast W (d, m) to the layer's dtype and write it into the layer."""
    weight = layer.weight.data
    weight.copy_(torch.tensor(W.T.reshape(weight.shape)).to(weight.dtype))


def input_rows(layer, x):
    """X in float64, (rows, d)."""
    if isinstance(layer, nn.Linear):
        return x.detach().double().reshape(-1, layer.in_features).numpy()
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"outside the specification: {layer}")
    patches = F.unfold(x.detach().double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1]).numpy()  # (images, d, positions) -> (rows, d)


def grams(model, batches):
    """X^T X of every layer by module path, in the order of the layers' first calls."""
    model = copy.deepcopy(model).eval()
    result = OrderedDict()

    def hook_for(name):
        def hook(layer, args):
            X = input_rows(layer, args[0])
            result[name] = result.get(name, 0) + X.T @ X

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    return result


def rank_of(W):
    """The smallest r whose leading singular values hold 99.99 % of the energy of W; 0 for a zero matrix."""
    squares = np.linalg.svd(np.asarray(W, dtype=np.float64), compute_uv=False) ** 2
    r = 0
    while squares[:r].sum() < 0.9999 * squares.sum():
        r += 1
    return r


def projection(G, k):
    """V_k V_k^T, from the k leading eigenvectors of the symmetric matrix G."""
    eigenvalues, V = np.linalg.eigh((G + G.T) / 2)
    V_k = V[:, np.argsort(eigenvalues)[::-1][:k]]
    return V_k @ V_k.T


def project(W, G, k_s, k_t):
    """W' = P_S W P_T; a full k is no projection at all, so that the weight keeps its bits."""
    d, m = W.shape
    result = W
    if k_s < d:
        result = projection(G, k_s) @ result
    if k_t < m:
        result = result @ projection(W.T @ G @ W, k_t)
    return result


def count_correct(model, batches):
    with torch.no_grad():
        return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)


def allowed_loss(tolerance, N):
    """floor(tolerance N / 100), of the decimal that the user wrote."""
    return floor(Fraction(str(tolerance)) * N / 100)


def search(model, grams, batches, tolerance, mode="joint", budget=None, sides="ST"):
    """(rows, probes, mlu). A row is a dict per layer, a probe (layer, "S" or "T", k, passed, correct)."""
    if mode not in ("joint", "isolated"):
        raise ValueError(f"mode must be joint or isolated, not {mode!r}")
    original = copy.deepcopy(model).eval()
    N = sum(len(labels) for _, labels in batches)
    t = 0 if budget is not None else allowed_loss(tolerance, N)
    base = count_correct(original, batches)
    rows, probes = [], []
    current = copy.deepcopy(original)
    projections = 0

    for name, G in grams.items():
        if mode == "isolated":
            current = copy.deepcopy(original)
        layer = current.get_submodule(name)
        W = weight_matrix(layer)
        d, m = W.shape

        def correct_with(k_s, k_t):
            set_weight_matrix(layer, project(W, G, k_s, k_t))
            return count_correct(current, batches)

        def smallest(side, full, correct_at, needed):
            lo, hi = 1, full
            while lo < hi:
                k = (lo + hi) // 2
                correct = correct_at(k)
                passed = correct >= needed
                probes.append((name, side, k, passed, correct))
                if passed:
                    hi = k
                else:
                    lo = k + 1
            return lo

        k_s, k_t = d, m
        for number, side in enumerate(sides, 1):
            projections += 1
            if budget is not None:
                share = Fraction(projections, len(grams) * len(sides))
                needed = base - floor(share * Fraction(str(budget)) * N / 100)
            else:
                needed = base - number * t if mode == "isolated" else correct_with(k_s, k_t) - t
            if side == "S":
                k_s = smallest("S", d, lambda k: correct_with(k, m), needed)
            else:
                k_t = smallest("T", m, lambda k: correct_with(k_s, k), needed)  # noqa: B023

        correct = correct_with(k_s, k_t)  # and the projections stay in place
        rank = rank_of(project(W, G, k_s, k_t))
        rows.append(
            dict(
                layer=name,
                d=d,
                m=m,
                weight_rank=rank_of(W),
                k_s=k_s,
                k_t=k_t,
                rank=rank,
                utilization=rank / min(d, m),
                correct=correct,
            )
        )

    return rows, probes, sum(row["utilization"] for row in rows) / len(rows)


def factor(W, r):
    """(A, B, parameters): A (d, r) and B (r, m), whose product is the best rank-r approximation of W."""
    U, s, Vt = np.linalg.svd(np.asarray(W, dtype=np.float64), full_matrices=False)
    A, B = U[:, :r] * np.sqrt(s[:r]), np.sqrt(s[:r])[:, None] * Vt[:r]
    return A, B, r * (W.shape[0] + W.shape[1])


def bound(X, W, k_s, k_t):
    """The exact error of W' = P_S W P_T on explicit rows X (rows, d), its two orthogonal parts, and the bound."""
    X, W = np.asarray(X, dtype=np.float64), np.asarray(W, dtype=np.float64)
    Y = X @ W
    d, m = W.shape
    # all d (all m) right singular vectors; full_matrices, which also makes a rows x rows U, only if rows are too few
    V_S, V_T = (np.linalg.svd(A, full_matrices=len(A) < A.shape[1])[2].T for A in (X, Y))
    P_S, P_T = V_S[:, :k_s] @ V_S[:, :k_s].T, V_T[:, :k_t] @ V_T[:, :k_t].T
    square = lambda A: float((A**2).sum())

    def energy(A, k):
        squares = np.linalg.svd(A, compute_uv=False) ** 2
        return squares[:k].sum() / squares.sum()

    return dict(
        error=square(Y - X @ P_S @ W @ P_T),
        output_part=square(Y @ (np.eye(m) - P_T)),
        input_part=square(X @ (np.eye(d) - P_S) @ W @ P_T),
        bound=float((1 - energy(Y, k_t)) * square(Y) + (1 - energy(X, k_s)) * square(X) * np.linalg.norm(W, 2) ** 2),
    )
