"""The ResNet for CIFAR-10 of He et al. (arXiv 1512.03385, section 4.2), under the names of its public weights.

Weights: github.com/akamaster/pytorch_resnet_cifar10, `resnet56-4bfd9763.th`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut that drops pixels and pads channels."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride, self.padding = width // before, (width - before) // 2
        self.conv1 = nn.Conv2d(before, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, width, H/stride, W/stride)."""
        output = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(output + shortcut)


class ResNet(nn.Module):
    """Three stages of `depth` blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        for index, width in enumerate(WIDTHS, 1):
            blocks = [Block(before if first == 0 else width, width) for first in range(depth)]
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
            before = width
        self.linear = nn.Linear(WIDTHS[-1], 10)

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, 32, 32) in [-1, 1] -> the output of each stage."""
        mean, spread = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, SPREAD))
        x = F.relu(self.bn1(self.conv1(((pictures + 1) / 2 - mean) / spread)))
        outputs = []
        for index in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            outputs.append(x)
        return outputs

    def pool(self, last: Tensor) -> Tensor:
        """(N, 64, 8, 8) -> (N, 64)."""
        return last.mean((2, 3))


def load(path: Path) -> ResNet:
    """The network of a file of public weights, in eval mode; the names of the weights give its depth."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layer1."))
    network = ResNet(depth)
    network.load_state_dict(state)
    return network.eval()
