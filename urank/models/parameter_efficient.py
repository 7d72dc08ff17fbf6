"""Networks that use a matrix twice, as W and as W^T (arXiv 2401.16438), and nothing else of their own.

Column vectors, as in that paper; F is GELU, G is normalization, activation and a 3 x 3 convolution:

    feed-forward    FFN(x) = W^T F(W x + b_1) + b_2                                         8 d^2 -> 4 d^2 weights
    attention       Q = W_q x,  K = W_kv x,  V = W_kv^T x,  output W_q^T (heads)            4 d^2 -> 2 d^2
    bottleneck      x + W^T G_n(W x), one W for all blocks n of a stage

Every use has its own bias or normalization. The matrices are stored once and multiplied as often as before, so the
number of MACs stays the same. The paper's text does not give the rule for attention and the shape of the bottleneck's
stages; both are those of its authors' later code (see the book's page on this paper).

Each network has a twin in which no matrix is shared: the same depth, widths and heads.
"""

from typing import Any

import torch
import torchvision
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from urank.models.resnet import ResNet
from urank.models.transformers import on_patches, scaled
from urank.models.vgg import initialize
from urank.shared_layers import Transposed


class TiedQKV(nn.Module):
    """Queries, keys and values [W_q x, W_kv x, W_kv^T x] side by side: (..., d) -> (..., 3 d)."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.q, self.k = nn.Linear(d, d, bias), nn.Linear(d, d, bias)
        self.v = Transposed(self.k, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class TiedAttention(Attention):
    """timm's attention with two matrices in place of four."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool, **options: Any):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, **options)
        qkv = TiedQKV(dim, qkv_bias)
        self.set_submodule("qkv", qkv)
        self.set_submodule("proj", Transposed(qkv.q, proj_bias))


class TiedMlp(Mlp):
    """timm's feed-forward network with one matrix in place of two."""

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True, **options: Any):
        super().__init__(in_features, hidden_features, bias=bias, **options)
        self.set_submodule("fc2", Transposed(self.fc1, bias))


TIED: dict[str, Any] = dict(attn_layer=TiedAttention, mlp_layer=TiedMlp)


def vit_pe(classes: int = 10, width: float = 1.0, **options: Any) -> VisionTransformer:
    """Return the twin of `vit`, 6 blocks of 192 features for 32 x 32 images, with tied matrices."""
    return on_patches(32, scaled(6, width), depth=6, classes=classes, **TIED, **options)


def vit_pe_224(features: int, classes: int = 1000) -> VisionTransformer:
    """Return the twin of a DeiT for 224 x 224 images, 12 blocks of 192, 384 or 768 features, with tied matrices.

    >>> with torch.device("meta"):
    ...     sum(parameter.numel() for parameter in vit_pe_224(192).parameters())
    3063208
    """
    return VisionTransformer(num_classes=classes, embed_dim=features, depth=12, num_heads=features // 64, **TIED)


class Grow(nn.Module):
    """Double the channels at the entry of a tied stage: images (n, c, h, w) -> (n, 2 c, h, w).

    The new channels are a depthwise 3 x 3 convolution of the old ones.
    """

    def __init__(self, channels: int):
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.new = nn.Sequential(depthwise, nn.BatchNorm2d(channels), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.new(x), x], 1)


def tied_stage(count: int, channels: int, stride: int) -> nn.Sequential:
    """Return `count` bottlenecks of 4 `channels` that share one W, after a `Grow` from 2 `channels`.

    The shortcut of the first block is a depthwise convolution with this stride in place of a projection.
    """
    outputs = 4 * channels
    shared = nn.Conv2d(outputs, channels, 1, bias=False)
    depthwise = nn.Conv2d(outputs, outputs, 3, stride, padding=1, groups=outputs, bias=False)
    shortcut = nn.Sequential(depthwise, nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs))
    blocks = [Bottleneck(outputs, channels, stride, shortcut)]
    blocks += [Bottleneck(outputs, channels) for _ in range(count - 1)]
    for block in blocks:
        block.conv1, block.conv3 = shared, Transposed(shared, bias=False)
    stage = nn.Sequential(Grow(outputs // 2), *blocks).apply(initialize)
    nn.init.xavier_normal_(shared.weight)
    return stage


def resnet50_pe(classes: int = 1000) -> torchvision.models.ResNet:
    """Return a ResNet-50 for 224 x 224 images whose stages 3 and 4 have one W each.

    >>> with torch.device("meta"):
    ...     sum(parameter.numel() for parameter in resnet50_pe().parameters())
    15515176
    """
    network = torchvision.models.resnet50(num_classes=classes)
    network.layer3 = tied_stage(6, 256, stride=2)
    network.layer4 = tied_stage(3, 512, stride=2)
    return network


def resnet29_pe(tied: int, classes: int = 10, width: float = 1.0) -> ResNet:
    """Return the thin bottleneck ResNet for 32 x 32 images whose last `tied` stages, 0 to 2, have one W each.

    Its channels double exactly from stage to stage, as `Grow` needs.
    """
    thinnest = max(1, round(16 * width))
    network = ResNet("resnet29", classes, width=thinnest / 16)
    for stage, channels in (("stage3", 4 * thinnest), ("stage2", 2 * thinnest))[:tied]:
        network.set_submodule(stage, tied_stage(3, channels, stride=2))
    return network
