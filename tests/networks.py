"""Small networks that the tests of attribution share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classifiers.network import Network


class Small(nn.Module):
    """A convolutional network with batch norm and in-place ReLU."""

    def __init__(self, num_logits: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(6, num_logits)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


class Tiny(nn.Module):
    """The backbone of the kept checkpoints in tests/fixtures: a change of it breaks them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(4, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


def network_around(backbone: nn.Module, num_logits: int = 1) -> Network:
    network = Network("squeezenet1_1", num_logits)
    network.backbone = backbone
    return network.eval().requires_grad_(False)


def small(num_logits: int = 1) -> Network:
    torch.manual_seed(0)
    return network_around(Small(num_logits), num_logits)


def images(count: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 10, 12, generator=torch.Generator().manual_seed(1))
