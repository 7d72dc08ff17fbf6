"""Multiply-accumulate operations of a vision transformer in closed form, and what profilers count of them.

For n tokens of width d, L blocks, an MLP of width 4 d and patches of 3 x p x p pixels,

    patches  (n - 1) 3 p^2 d        QKV  3 L n d^2        attention  2 L n^2 d
    output   L n d^2                MLP  8 L n d^2        head       d classes.

Attention is Q K^T and the product with V. It has no weights, so factorization does not make it cheaper.
"""

from dataclasses import dataclass

import pandas as pd
from pandas.io.formats.style import Styler
from torch import nn

from urank.reproduction import paper
from urank.reproduction.figures.style import styled

HIDDEN = ("qkv", "attention")  # missed by a profiler that counts called layers only


@dataclass(frozen=True)
class Transformer:
    """The sizes that determine a vision transformer's cost."""

    side: int
    patch: int
    width: int
    depth: int
    classes: int = 1000

    @property
    def tokens(self) -> int:
        """Number of patches of the image, plus the class token."""
        return (self.side // self.patch) ** 2 + 1

    @classmethod
    def of(cls, network: nn.Module) -> "Transformer":
        """Return the sizes of a torchvision `VisionTransformer`."""
        return cls(
            side=network.image_size,
            patch=network.patch_size,
            width=network.hidden_dim,
            depth=len(network.encoder.layers),
            classes=network.num_classes,
        )


def macs(sizes: Transformer) -> dict[str, int]:
    """Return the MACs for one image by part.

    >>> sum(macs(Transformer(side=224, patch=16, width=768, depth=12)).values())
    17563828224
    """
    n, d, blocks = sizes.tokens, sizes.width, sizes.depth
    return dict(
        patches=(n - 1) * 3 * sizes.patch**2 * d,
        qkv=3 * blocks * n * d**2,
        attention=2 * blocks * n**2 * d,
        output=blocks * n * d**2,
        mlp=8 * blocks * n * d**2,
        head=d * sizes.classes,
    )


def weights(sizes: Transformer) -> dict[str, int]:
    """Return the entries of the weight matrices by part; attention itself has none."""
    d, blocks = sizes.width, sizes.depth
    return dict(
        patches=3 * sizes.patch**2 * d,
        qkv=3 * blocks * d**2,
        output=blocks * d**2,
        mlp=8 * blocks * d**2,
        head=d * sizes.classes,
    )


def other_parameters(sizes: Transformer) -> int:
    """Return the parameters outside weight matrices: biases, norms, the class token and the positions."""
    d, blocks = sizes.width, sizes.depth
    biases = d + blocks * (3 + 1 + 4 + 1) * d + sizes.classes
    norms = (2 * blocks + 1) * 2 * d
    return biases + norms + d + sizes.tokens * d


def implied_ratio(sizes: Transformer, params_ratio: float, hidden: tuple[str, ...] = ()) -> float:
    """Return the share of MACs that a share of parameters implies if every weight matrix shrinks by one factor.

    Args:
        hidden: parts missing from the count of the factored network; the count of the original is complete.
    """
    matrices, rest = sum(weights(sizes).values()), other_parameters(sizes)
    factor = (params_ratio * (matrices + rest) - rest) / matrices
    parts = macs(sizes)
    shrunk = {part: count if part == "attention" else factor * count for part, count in parts.items()}
    return sum(count for part, count in shrunk.items() if part not in hidden) / sum(parts.values())


def flops_column() -> pd.DataFrame:
    """Return the FLOPs column of the plain vision transformers in Tables 1, 4 and 5, recomputed from the params column.

    Returns:
        `printed`; `implied` by the share of parameters if all matrices shrink by one factor; `hidden`, the same if
        the factored network is counted without QKV and attention (nan for timm, whose QKV is a plain layer).
    """
    once = paper.table4().query("variant != ''"), paper.table5().query("tolerance != 0.1")  # these are in Table 1
    rows = pd.concat([paper.table1(), *once])
    found = []
    for one in rows[rows["network"].str.contains("/vit_|/deit_")].to_dict("records"):
        library = one["network"].split("/")[0]
        sizes = transformer(one["network"], paper.side(one["model"], one["dataset"]))
        hidden = implied_ratio(sizes, one["params_ratio"], HIDDEN) if library == "torchvision" else float("nan")
        name = one["model"] + (f" at tolerance {one['tolerance']:g}" if pd.notna(one["tolerance"]) else "")
        implied = implied_ratio(sizes, one["params_ratio"])
        found.append(
            dict(network=name, library=library, params=one["params_ratio"], printed=one["flops_ratio"])
            | dict(implied=implied, hidden=hidden)
        )
    return pd.DataFrame(found)


def transformer(name: str, side: int) -> Transformer:
    """Return the sizes of one of the paper's vision transformers, on images of `side` x `side` pixels."""
    network = paper.original_network(name, "imagenet-1k", side)
    if name.startswith("torchvision/"):
        return Transformer.of(network)
    return Transformer(side, network.patch_embed.patch_size[0], network.embed_dim, len(network.blocks))


def seen(sizes: Transformer) -> float:
    """Return the share of the MACs that a profiler counts that misses QKV and attention."""
    parts = macs(sizes)
    return 1 - sum(parts[part] for part in HIDDEN) / sum(parts.values())


def parts_table(sizes: Transformer) -> Styler:
    """Return MACs and weights by part, as a page shows them."""
    frame = pd.DataFrame({"MACs": macs(sizes), "weights": weights(sizes)})
    frame["share of MACs"] = frame["MACs"] / frame["MACs"].sum()
    return styled(frame, "parts", {"MACs": "{:,.0f}", "weights": "{:,.0f}", "share of MACs": "{:.1%}"})
