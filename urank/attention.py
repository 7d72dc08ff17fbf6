"""Attention whose matrices are layers.

`nn.MultiheadAttention` multiplies by four matrices without calling a layer: W_Q, W_K and W_V lie one upon the other in
one parameter, and its output projection is only read. `ExplicitAttention` computes the same with two linear layers,

    [Q K V] = X [W_Q W_K W_V],    Y = concat_h(softmax(Q_h K_h^T / sqrt(d_h)) V_h) W_O,

the first of which is fused, d x 3d, as in timm's vision transformers.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def explicit_attention(model: nn.Module) -> nn.Module:
    """A copy of `model` that computes the same, every `nn.MultiheadAttention` in it being an `ExplicitAttention`.

    The weights keep their values. An attention that cannot be made explicit stays as it is; `skipped_layers` says why.
    A `nn.TransformerEncoder` gives up nested tensors, which leave out padded positions: at these, and only there, its
    outputs are no longer zeros.
    """
    explicit: dict[nn.Module, ExplicitAttention] = {}
    network = copy.deepcopy(model)
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.MultiheadAttention) and obstacle(module) is None:
            explicit.setdefault(module, ExplicitAttention(module))
            if path == "":
                return explicit[module]
            network.set_submodule(path, explicit[module])
    for encoder in network.modules():
        if isinstance(encoder, nn.TransformerEncoder) and set(encoder.modules()) & set(explicit.values()):
            encoder.use_nested_tensor = False  # as torch decides for every attention without its own fast path
    return network


def obstacle(attention: nn.MultiheadAttention) -> str | None:
    """Why `attention` cannot be made explicit; None where it can."""
    if getattr(attention.forward, "__func__", None) is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} has a forward of its own"
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "it has forward hooks"
    if (attention.kdim, attention.vdim) != (attention.embed_dim, attention.embed_dim):
        return f"keys and values of widths {attention.kdim} and {attention.vdim}, queries of {attention.embed_dim}"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "keys and values are added to the sequence (add_bias_kv or add_zero_attn)"
    stored = all(isinstance(weight, nn.Parameter) for weight in (attention.in_proj_weight, attention.out_proj.weight))
    return None if stored else "a weight is computed (a parametrization)"


class ExplicitAttention(nn.Module):
    """Multi-head attention with two linear layers, `in_proj` (d -> 3d) and `out_proj` (d -> d).

    Called and answers as the `nn.MultiheadAttention` whose parameters it takes over. Where queries, keys and values
    are one tensor, `in_proj` is called once. Where they differ it is called on each, and a third of each result used:
    the rows of X are then all three inputs.
    """

    # nn.TransformerEncoderLayer asks its attention for these; without a bias here it does not run past the layers
    # in a fused kernel.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.in_proj = linear_of(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = linear_of(attention.out_proj.weight, attention.out_proj.bias)
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
        """(outputs, weights or None), with the arguments and shapes of `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: `is_causal`, a hint about `attn_mask`, without a mask; a mask neither boolean nor floating.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says what attn_mask is: give the mask as well")
        batched = query.ndim == 3
        mask = merge_masks(attn_mask, key_padding_mask, self.num_heads, query.dtype)
        q, k, v = (self.split_heads(projected) for projected in self.project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = attention_weights(q, k, mask, dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        outputs = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return outputs[0], weights
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Q, K and V, each of the shape of what it is made from."""
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        return tuple(self.in_proj(x).chunk(3, -1)[third] for third, x in enumerate((query, key, value)))

    def split_heads(self, x: Tensor) -> Tensor:
        """(n, l, d), (l, n, d) where `batch_first` is False, or (l, d) -> (n, heads, l, d / heads)."""
        if x.ndim == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer that holds these very parameters, weight (m, d) and bias (m,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores (n, heads, l, s) before the softmax; None where nothing is.

    Args:
        attn_mask: (l, s) or (n heads, l, s), True or -inf where a query must not look.
        key_padding_mask: (n, s) or (s,), True or -inf where there is no key.
    """
    masks = []
    if attn_mask is not None:
        scores = additive(attn_mask, dtype)
        masks.append(scores if scores.ndim == 2 else scores.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        masks.append(additive(key_padding_mask, dtype)[..., None, None, :])
    return sum(masks) if masks else None


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"an attention mask is boolean or floating, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d_h) + mask), (n, heads, l, s), after dropout."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    return F.dropout(scores.softmax(-1), dropout)
