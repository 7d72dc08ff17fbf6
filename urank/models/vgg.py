"""VGG for 32 x 32 images: convolutions with batch normalization and a single linear classifier.

The paper takes its CIFAR networks from a public repository. Its VGG variants have one linear layer 512 -> classes
instead of the three large ones of the original (Simonyan & Zisserman 2015), and 9.23 M to 20.04 M parameters.
"""

from torch import Tensor, nn

# Output channels of the 3 x 3 convolutions; "M" is max pooling. The five poolings reduce 32 x 32 to 1 x 1.
STAGES: dict[str, list[int | str]] = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}


class VGG(nn.Module):
    """VGG with batch normalization: images (n, 3, 32, 32) -> logits (n, classes).

    Args:
        depth: "vgg11", "vgg13", "vgg16" or "vgg19".
        classes: number of classes.
        width: factor on every channel count; 1.0 is the paper's network.
    """

    def __init__(self, depth: str, classes: int = 10, width: float = 1.0):
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for stage in STAGES[depth]:
            if isinstance(stage, str):
                blocks.append(nn.MaxPool2d(2))
            else:
                out = max(1, round(stage * width))
                blocks += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def initialize(module: nn.Module) -> None:
    """Initialize a convolution as He et al. (2015, fan out) and a linear layer from N(0, 0.01^2), with zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
