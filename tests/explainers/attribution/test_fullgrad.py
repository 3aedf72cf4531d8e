from __future__ import annotations

import torch
from networks import images, small
from torch.nn.functional import interpolate
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.fullgrad import FullGrad, full_gradients, to_unit_range
from explainers.attribution.scores import ClassScores


def biased() -> Network:
    network = small(3)
    network.backbone.get_buffer("features.1.running_mean").uniform_(-1, 1)
    return network


def test_full_gradients_add_up_to_the_score() -> None:  # Eq. 3: the network is piecewise linear
    network, image, target = biased(), images(), torch.tensor([2, 0, 1])
    parts = full_gradients(network, image, target)
    last = network.backbone.get_parameter("head.bias")[target]
    total = torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0) + last
    assert_close(total, ClassScores(network)(image).gather(1, target[:, None])[:, 0])


def test_full_gradients_of_a_real_network_add_up() -> None:  # biases in batch norm alone
    torch.manual_seed(0)
    network, image = (
        Network("resnet18").double().eval().requires_grad_(False),
        torch.rand(2, 1, 64, 64),
    )
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    parts = full_gradients(network, image.double(), torch.tensor([1, 0]))
    assert len(parts) == 1 + 20  # the input and every batch norm
    total = torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0)
    last = network.backbone.get_parameter("fc.bias") * torch.tensor([1, -1])
    score = ClassScores(network)(image.double()).gather(1, torch.tensor([[1], [0]]))[:, 0]
    assert_close(total + last, score)


def test_the_map_adds_the_scaled_parts() -> None:
    network, image, target = biased(), images(), torch.tensor([2, 0, 1])
    expected = torch.zeros(3, 10, 12)
    for part in full_gradients(network, image, target):
        for k, one in enumerate(part.abs()):
            scaled = (one - one.min()) / (one.max() - one.min())
            large = interpolate(scaled[None], (10, 12), mode="bilinear", align_corners=False)
            expected[k] += large[0].sum(0)
    assert_close(FullGrad(network).explain(image, target), expected)


def test_the_range_of_equal_values_is_zero() -> None:
    values = torch.stack([torch.full((2, 3, 3), 7.0), torch.arange(18.0).view(2, 3, 3)])
    scaled = to_unit_range(values)
    assert_close(scaled[0], torch.zeros(2, 3, 3))
    assert_close(scaled[1], values[1] / 17)
