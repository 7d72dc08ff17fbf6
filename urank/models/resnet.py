"""ResNet for 32 x 32 images: a thin network of 16, 32 and 64 channels (He et al. 2016, section 4.2).

The paper speaks of ResNet18, ResNet50 and ResNet101 on CIFAR. The public repository that it takes its CIFAR networks
from has only this thin kind, of depth 6 n + 2 with n basic blocks a stage or 9 n + 2 with n bottlenecks, and the
paper's accuracies fit a thin network, not one of 11 M parameters and more. Nothing printed says which n was meant. At
10 classes these are read as

    resnet18    basic blocks, n = 3     depth 20, as 18 is no 6 n + 2    0.272 M parameters
    resnet50    basic blocks, n = 8     depth 50                         0.759 M
    resnet101   bottlenecks,  n = 11    depth 101                        1.055 M
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from urank.models.vgg import initialize

# The kind of block and how many of them a stage has.
BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], int]] = {
    "resnet18": (BasicBlock, 3),
    "resnet50": (BasicBlock, 8),
    "resnet101": (Bottleneck, 11),
}


class ResNet(nn.Module):
    """Thin ResNet with batch norm for (n, 3, 32, 32) images; returns (n, classes) logits.

    Args:
        depth: "resnet18", "resnet50" or "resnet101".
        classes: number of classes.
        width: factor on every channel count (1.0 is 16, 32 and 64 channels).
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
    """`count` blocks, the first with `stride`, and with a 1 x 1 convolution as shortcut where it must be."""
    outputs, shortcut = channels * block.expansion, None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(
        block(inputs, channels, stride, shortcut), *(block(outputs, channels) for _ in range(count - 1))
    )
