from __future__ import annotations

import warnings

import captum.attr
import pytest
import torch
from networks import images, network_around
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.rules import AtCalls, DeepLIFT, GuidedBackpropagation
from explainers.attribution.scores import ClassScores


class Plain(nn.Module):
    """What captum's hooks can deal with: every activation a module of its own, none in place."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 5, 3),
            nn.BatchNorm2d(5),
            activation(),
            nn.Flatten(),
            nn.Linear(60, 4),
            activation(),
            nn.Linear(4, 3),
        )

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits


class Reused(nn.Module):
    """The same mathematics with one module used twice in place, and functions."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.layers, self.relu = plain.layers, nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        conv, _, _, second, norm, _, flatten, linear, _, last = self.layers
        x = F.avg_pool2d(self.relu(conv(image)), 2)
        x = self.relu(norm(second(x)))
        logits: Tensor = last(torch.relu(linear(flatten(x))))
        return logits


def plain(activation: type[nn.Module] = nn.ReLU) -> Network:
    torch.manual_seed(0)
    network = network_around(Plain(activation), 3)
    return network.double().eval().requires_grad_(False)


def doubles() -> Tensor:
    return images(3, 3).double()


TARGET = torch.tensor([2, 0, 1])


def test_guided_backpropagation_is_captums() -> None:
    network, image = plain(), doubles()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum says that it hooks the ReLUs
        oracle = captum.attr.GuidedBackprop(ClassScores(network))
        expected = oracle.attribute(image.clone().requires_grad_(), TARGET).sum(1).abs()
    assert_close(GuidedBackpropagation(network).explain(image, TARGET), expected.detach())


def test_guided_backpropagation_passes_relu6_where_it_is_open() -> None:  # slopes by hand
    class Six(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            weight = torch.tensor([3.0, -2.0, 5.0]) / 3  # for pixels at 0.5, 0.25, 0.9
            opened = F.relu6(image.mean(1).flatten(1) * 10 - 1, inplace=True)
            return (opened * weight).sum(1, keepdim=True)

    network = network_around(Six())
    network.mean.zero_()
    network.std.fill_(1.0)
    image = torch.tensor([0.5, 0.25, 0.9]).view(1, 1, 1, 3)  # 4, 1.5, and 8, which is over 6
    found = GuidedBackpropagation(network).saliency(image, torch.tensor([1]))
    assert_close(found, torch.tensor([[[10.0, 0.0, 0.0]]]))


def test_guided_backpropagation_without_a_relu_says_so() -> None:
    with pytest.warns(UserWarning, match="calls no ReLU"):
        GuidedBackpropagation(plain(nn.GELU)).explain(doubles())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Softplus, nn.ELU])
def test_deeplift_is_captums(activation: type[nn.Module]) -> None:
    network, image = plain(activation), doubles()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = captum.attr.DeepLift(ClassScores(network))
        expected = oracle.attribute(image.clone(), torch.zeros_like(image), TARGET).sum(1).abs()
    found = DeepLIFT(network).explain(image, TARGET)
    assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", [DeepLIFT, GuidedBackpropagation])
def test_modules_reused_and_in_place_change_nothing(
    method: type[DeepLIFT] | type[GuidedBackpropagation],
) -> None:
    network = plain()
    expected = method(network).explain(doubles(), TARGET)
    assert isinstance(network.backbone, Plain)
    network.backbone = Reused(network.backbone)
    assert_close(method(network).explain(doubles(), TARGET), expected)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "densenet121", "vgg11"])
def test_deeplift_is_complete_on_real_networks(name: str) -> None:
    torch.manual_seed(0)
    network, image = Network(name).eval(), torch.rand(2, 1, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepLIFT(network).explain(image)


def test_deeplift_shares_out_max_pooling_by_hand() -> None:
    class Largest(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            shift = torch.tensor([0.0, 2.0, 0.0, 1.0])  # black gives 2 at the second pixel
            return F.max_pool2d(image.mean(1, keepdim=True) * 4 + shift, (1, 4)).flatten(1)

    network = network_around(Largest())
    network.mean.zero_()
    network.std.fill_(1.0)
    image = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.25, 0.0, 0.0, 0.0]]).view(2, 1, 1, 4)
    found = DeepLIFT(network).saliency(image, torch.tensor([1, 1]))
    assert_close(found, torch.tensor([[[2.0, 0, 0, 0]], [[0.0, 0, 0, 0]]]))  # 4 - 2, and 2 - 2


def test_deeplift_says_where_it_is_not_complete() -> None:
    class Product(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            grey = image.mean(1).flatten(1)
            return (grey * grey).sum(1, keepdim=True)

    with pytest.warns(UserWarning, match=r"by up to \d+\.\d% of all attribution"):
        DeepLIFT(network_around(Product())).explain(images())


def test_rules_see_every_form_of_an_activation() -> None:
    value, seen = torch.tensor([-1.0, 8.0]), []

    def rule(given: Tensor, function: object) -> Tensor:
        assert callable(function)
        seen.append(function(given).tolist())
        return given

    with AtCalls({"relu": rule, "relu6": rule, "leaky_relu": rule}):
        for call in (F.relu, torch.relu, nn.ReLU(inplace=True), torch.Tensor.relu_):
            call(value)
        F.relu(value, True)
        F.leaky_relu(value, 0.5)
        nn.ReLU6(inplace=True)(value)
        F.relu6(value)
        nn.Hardtanh()(value)  # no ReLU6
    assert value.tolist() == [-1.0, 8.0]
    assert seen == [[0.0, 8.0]] * 5 + [[-0.5, 8.0]] + [[0.0, 6.0]] * 2
