"""The networks of the first paper's Tables 1, 3 and 4, and of the second paper, under the names that they print."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from urank.models.parameter_efficient import resnet50_pe, vit_pe_224


class Published(NamedTuple):
    """How to create a network of the paper: `create(name, classes, pretrained=weights)`.

    `weights` is the published tag whose documented accuracy is nearest the paper's, None for a network that the paper
    trains itself. Neither is printed: `data/paper/weights_match.csv` has the comparison.
    """

    name: str
    weights: str | None


# By the model and the data set as `data/paper/table*.csv` have them.
PAPER: dict[tuple[str, str], Published] = {
    ("ViTB16", "ImageNet-1k"): Published("torchvision/vit_b_16", "IMAGENET1K_V1"),
    ("ViTB32", "ImageNet-1k"): Published("torchvision/vit_b_32", "IMAGENET1K_V1"),
    ("ViTL16", "ImageNet-1k"): Published("torchvision/vit_l_16", "IMAGENET1K_V1"),
    ("ViTL32", "ImageNet-1k"): Published("torchvision/vit_l_32", "IMAGENET1K_V1"),
    ("DeiT-Tiny", "ImageNet-1k"): Published("timm/deit_tiny_patch16_224", "fb_in1k"),
    ("DeiT-Small", "ImageNet-1k"): Published("timm/deit_small_patch16_224", "fb_in1k"),
    ("DeiT-Base", "ImageNet-1k"): Published("timm/deit_base_patch16_224", "fb_in1k"),
    ("SWIN-Tiny", "ImageNet-1k"): Published("timm/swin_tiny_patch4_window7_224", "ms_in1k"),
    ("SWIN-Small", "ImageNet-1k"): Published("timm/swin_small_patch4_window7_224", "ms_in22k_ft_in1k"),
    ("SWIN-Base", "ImageNet-1k"): Published("timm/swin_base_patch4_window7_224", "ms_in22k_ft_in1k"),
    ("SWIN-Large", "ImageNet-1k"): Published("timm/swin_large_patch4_window7_224", "ms_in22k_ft_in1k"),
    ("ResNet34", "ImageNet-1k"): Published("torchvision/resnet34", "IMAGENET1K_V1"),
    ("ResNet50", "ImageNet-1k"): Published("torchvision/resnet50", "IMAGENET1K_V2"),
    ("ResNet101", "ImageNet-1k"): Published("torchvision/resnet101", "IMAGENET1K_V2"),
    ("WideResNet50_2", "ImageNet-1k"): Published("torchvision/wide_resnet50_2", "IMAGENET1K_V2"),
    ("WideResNet101_2", "ImageNet-1k"): Published("torchvision/wide_resnet101_2", "IMAGENET1K_V2"),
    ("ViTB16 - scratch", "ImageNet-1k"): Published("torchvision/vit_b_16", "IMAGENET1K_V1"),
    ("ViTB16, FT, Lin", "ImageNet-1k"): Published("torchvision/vit_b_16", "IMAGENET1K_SWAG_LINEAR_V1"),
    ("ViTB16, FT, E2E", "ImageNet-1k"): Published("torchvision/vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
} | {
    (model, dataset): Published(model.lower(), None)
    for model in ("VGG11", "VGG13", "VGG16", "VGG19", "ResNet18", "ResNet50", "ResNet101")
    for dataset in ("CIFAR10", "CIFAR100")
}

# By the model as `data/paper/pe_table.csv` has it. The width of a ViT is inferred from its number of parameters.
PARAMETER_EFFICIENT: dict[str, Callable[[], nn.Module]] = {
    "ResNet50 (HaLViT)": resnet50_pe,
    "HaLViT-Tiny": partial(vit_pe_224, 384),
    "HaLViT-M (also called HaLViT-Small)": partial(vit_pe_224, 768),
}
