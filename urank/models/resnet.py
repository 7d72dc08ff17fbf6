"""ResNet for 32 x 32 images: a thin network with 16, 32 and 64 channels (He et al. 2016, section 4.2).

The paper reports ResNet18, ResNet50 and ResNet101 on CIFAR and takes its CIFAR networks from a public repository. That
repository only has this thin variant, with depth 6 n + 2 (n basic blocks per stage) or 9 n + 2 (n bottlenecks). The
paper's accuracies also fit a thin network better than one with 11 M parameters. The paper does not give n. We use

    name        blocks per stage        depth                        parameters (10 classes)
    resnet18    3 basic blocks          20 (18 is not 6 n + 2)       0.272 M
    resnet50    8 basic blocks          50                           0.759 M
    resnet101   11 bottlenecks          101                          1.055 M

Three more are not the paper's: `resnet29`, with 3 bottlenecks per stage, is the twin of the networks in
`parameter_efficient`; `resnet32` and `resnet56`, with 5 and 9 basic blocks, are those of He et al.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from urank.models.vgg import initialize

# Block type and number of blocks per stage.
BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], int]] = {
    "resnet18": (BasicBlock, 3),
    "resnet29": (Bottleneck, 3),
    "resnet32": (BasicBlock, 5),
    "resnet50": (BasicBlock, 8),
    "resnet56": (BasicBlock, 9),
    "resnet101": (Bottleneck, 11),
}


class ResNet(nn.Module):
    """Thin ResNet with batch normalization: images (n, 3, 32, 32) -> logits (n, classes).

    Args:
        depth: a name from `BLOCKS`.
        classes: number of classes.
        width: factor on every channel count; 1.0 is 16, 32 and 64 channels.
    """

    def __init__(self, depth: str, classes: int = 10, width: float = 1.0):
        super().__init__()
        block, count = BLOCKS[depth]
        c1, c2, c3 = (max(1, round(channels * width)) for channels in (16, 32, 64))
        self.stem = nn.Sequential(nn.Conv2d(3, c1, 3, padding=1, bias=False), nn.BatchNorm2d(c1), nn.ReLU(inplace=True))
        self.stage1 = stage(block, count, c1, c1, stride=1)
        self.stage2 = stage(block, count, c1 * block.expansion, c2, stride=2)
        self.stage3 = stage(block, count, c2 * block.expansion, c3, stride=2)
        self.classifier = nn.Linear(c3 * block.expansion, classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


def stage(block: type[BasicBlock | Bottleneck], count: int, inputs: int, channels: int, stride: int) -> nn.Sequential:
    """Return `count` blocks; the first has this stride, and a 1 x 1 convolution as shortcut if shapes differ."""
    outputs, shortcut = channels * block.expansion, None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(
        block(inputs, channels, stride, shortcut), *(block(outputs, channels) for _ in range(count - 1))
    )
