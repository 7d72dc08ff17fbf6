"""Transformers for 32 x 32 images, of timm's own classes: ViT, DeiT and Swin as the paper names them, smaller.

The paper's are trained on ImageNet; create those as "torchvision/vit_b_16" or "timm/deit_tiny_patch16_224". No
stochastic depth: what a fit draws at random is to follow from its seed and epoch alone.
"""

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer


def vit(classes: int = 10, width: float = 1.0) -> VisionTransformer:
    """Six blocks of 192 features on patches of 4 x 4; returns (n, classes) logits.

    Args:
        width: factor on the number of heads, 6, each of 32 features.
    """
    return on_patches(32, scaled(6, width), depth=6, classes=classes)


def deit(classes: int = 10, width: float = 1.0) -> VisionTransformer:
    """DeiT-Tiny on patches of 4 x 4: twelve blocks of 192 features; returns (n, classes) logits.

    The plain DeiT, as in the paper's tables: without the distillation token and its second classifier.

    Args:
        width: factor on the number of heads, 3, each of 64 features.
    """
    return on_patches(64, scaled(3, width), depth=12, classes=classes)


def on_patches(features: int, heads: int, depth: int, classes: int) -> VisionTransformer:
    """Patches of 4 x 4; `features` a head."""
    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=features * heads, depth=depth, num_heads=heads, num_classes=classes
    )


def swin(classes: int = 10, width: float = 1.0) -> SwinTransformer:
    """The first three stages of a Swin with 96, 192 and 384 features, on patches of 2 x 2 in windows of 4 x 4.

    Args:
        width: factor on the numbers of heads, 3, 6 and 12, each of 32 features.
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
    return max(1, round(heads * width))
