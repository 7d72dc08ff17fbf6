"""Small ViT, DeiT and Swin transformers for 32 x 32 images, built from timm's classes.

The paper's transformers are trained on ImageNet; create them as "torchvision/vit_b_16" or "timm/deit_tiny_patch16_224".
The networks here have no stochastic depth, so the random numbers of a fit depend only on its seed and epoch.
"""

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer


def vit(classes: int = 10, width: float = 1.0, **options: Any) -> VisionTransformer:
    """Return a ViT with 4 x 4 patches and 6 blocks of 192 features.

    Args:
        width: factor on the number of heads (6 heads of 32 features).
        options: further arguments of timm's `VisionTransformer`.
    """
    return on_patches(32, scaled(6, width), depth=6, classes=classes, **options)


def deit(classes: int = 10, width: float = 1.0) -> VisionTransformer:
    """Return a DeiT-Tiny with 4 x 4 patches: 12 blocks of 192 features.

    As in the paper's tables it has no distillation token and no second classifier.

    Args:
        width: factor on the number of heads (3 heads of 64 features).
    """
    return on_patches(64, scaled(3, width), depth=12, classes=classes)


def on_patches(features: int, heads: int, depth: int, classes: int, **options: Any) -> VisionTransformer:
    """Return a vision transformer with 4 x 4 patches and this number of features per head.

    Args:
        options: further arguments of timm's `VisionTransformer`.
    """
    sizes: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=features * heads, depth=depth, num_heads=heads)
    return VisionTransformer(num_classes=classes, **sizes, **options)


def swin(classes: int = 10, width: float = 1.0) -> SwinTransformer:
    """Return the first three stages of a Swin (96, 192, 384 features) with 2 x 2 patches and 4 x 4 windows.

    Args:
        width: factor on the numbers of heads (3, 6 and 12 heads of 32 features).
    """
    heads = scaled(3, width)
    return SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=32 * heads,
        depths=(2, 6, 2),
        num_heads=(heads, 2 * heads, 4 * heads),
        num_classes=classes,
        drop_path_rate=0.0,
    )


def scaled(heads: int, width: float) -> int:
    """Return the number of heads times the width, at least 1."""
    return max(1, round(heads * width))
