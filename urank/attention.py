"""Multi-head attention written as two linear layers.

`nn.MultiheadAttention` does not call a layer for its four matrix products. W_Q, W_K and W_V are stacked in one
parameter, and the output projection is not called: only its weight is read. `ExplicitAttention` computes the same with
two linear layers,

    [Q K V] = X [W_Q W_K W_V],    Y = concat_h(softmax(Q_h K_h^T / sqrt(d_h)) V_h) W_O.

The first, `in_proj`, is a fused d x 3d layer as in timm's vision transformers; the second is `out_proj`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def explicit_attention(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which `ExplicitAttention` replaces every `nn.MultiheadAttention`.

    The weights and the outputs stay the same. An attention module that cannot be converted is copied unchanged;
    `skipped_layers` gives the reason.

    Note:
        `nn.TransformerEncoder` stops using nested tensors, so its outputs at padded positions are no longer zero.

    >>> encoder = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
    >>> type(explicit_attention(encoder).self_attn).__name__
    'ExplicitAttention'
    """
    explicit: dict[nn.Module, ExplicitAttention] = {}
    network = copy.deepcopy(model)
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.MultiheadAttention) and unsupported_reason(module) is None:
            explicit.setdefault(module, ExplicitAttention(module))
            if path == "":
                return explicit[module]
            network.set_submodule(path, explicit[module])
    for encoder in network.modules():
        if isinstance(encoder, nn.TransformerEncoder) and set(encoder.modules()) & set(explicit.values()):
            encoder.use_nested_tensor = False  # torch does this for every attention without its fused kernel
    return network


@contextmanager
def unfused_attention(network: nn.Module) -> Iterator[None]:
    """On a CPU, let timm's attention layers multiply two matrices with a softmax in between, inside the block.

    torch's fused attention is slow there in bfloat16. On an AMD EPYC a training step of a ViT with 128 features took
    379 ms with it and 192 ms without, and 1,000 images in a DeiT-Tiny 7.2 s and 5.5 s.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
    fused: list[Any] = [module for module in network.modules() if on_cpu and getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def unsupported_reason(attention: nn.MultiheadAttention) -> str | None:
    """Return why `attention` cannot be converted to an `ExplicitAttention`, or None if it can."""
    if getattr(attention.forward, "__func__", None) is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} overrides forward"
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "it has forward hooks"
    if (attention.kdim, attention.vdim) != (attention.embed_dim, attention.embed_dim):
        return f"keys and values have widths {attention.kdim} and {attention.vdim}, queries {attention.embed_dim}"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds keys and values to the sequence (add_bias_kv or add_zero_attn)"
    stored = all(isinstance(weight, nn.Parameter) for weight in (attention.in_proj_weight, attention.out_proj.weight))
    return None if stored else "a weight is computed (a parametrization)"


class ExplicitAttention(nn.Module):
    """Drop-in replacement for `nn.MultiheadAttention` with two linear layers; shares its parameters.

    If query, key and value are the same tensor, `in_proj` (d -> 3d) is called once. Otherwise it is called on each of
    the three and a third of each output is used, so the rows of X are all three inputs.

    Args:
        attention: module whose parameters are used.
    """

    # nn.TransformerEncoderLayer reads these attributes. Without a bias it does not use its fused kernel, which would
    # skip the two layers.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.in_proj = linear_from_parameters(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = linear_from_parameters(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (outputs, weights or None); arguments and shapes are those of `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: `is_causal` without `attn_mask`, or a mask that is neither boolean nor floating-point.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about attn_mask: pass attn_mask as well")
        mask = merge_masks(attn_mask, key_padding_mask, self.num_heads, query.dtype)
        q, k, v = (self.split_heads(projected) for projected in self.project(query, key, value))
        heads, weights = attend(q, k, v, mask, self.dropout if self.training else 0.0, need_weights)
        outputs = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.ndim == 2:
            return outputs[0], None if weights is None else weights[0]
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return Q, K and V with the shapes of query, key and value."""
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        return tuple(self.in_proj(x).chunk(3, -1)[third] for third, x in enumerate((query, key, value)))

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (n, l, d), or (l, n, d) without `batch_first`, or (l, d), to (n, heads, l, d / heads)."""
        if x.ndim == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def linear_from_parameters(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear layer that shares the parameters weight (m, d) and bias (m,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the sum of both masks, to be added to the scores (n, heads, l, s), or None if there is no mask.

    Args:
        attn_mask: (l, s) or (n * heads, l, s); True or -inf where a query must not attend to a key.
        key_padding_mask: (n, s) or (s,); True or -inf for padded keys.
    """
    masks = []
    if attn_mask is not None:
        scores = additive_mask(attn_mask, dtype)
        masks.append(scores if scores.ndim == 2 else scores.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        masks.append(additive_mask(key_padding_mask, dtype)[..., None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to a mask with 0 and -inf; return a floating-point mask unchanged."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"an attention mask must be boolean or floating-point, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(q k^T / sqrt(d_h) + mask) v (n, heads, l, d_h), and the softmax after dropout if needed."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights
