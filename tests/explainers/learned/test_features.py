"""A student reads the stages of any backbone."""

from __future__ import annotations

import pytest
import torch
from networks import images, network_around, small
from torch import Tensor, nn

from classifiers.network import Network
from explainers.learned.features import FeatureDecoder, stages


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet18", {"relu": 64, "layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}),
        ("vgg11", {"features.4": 128, "features.9": 256, "features.14": 512, "features.19": 512}),
        ("swin_t", {"features.1": 96, "features.3": 192, "features.5": 384, "permute": 768}),
        ("test_vit", {"norm": 64}),
    ],
)
def test_the_last_layer_of_each_resolution_is_a_stage(
    backbone: str, expected: dict[str, int]
) -> None:
    with torch.device("meta"):
        network = Network(backbone)
    found = stages(network)
    assert list(found.items())[: len(expected)] == list(expected.items())


def test_none_is_finer_than_what_is_drawn() -> None:
    assert list(stages(small(), 1)) == ["features.2", "features"]
    assert list(stages(small(), 2)) == ["features"]
    with pytest.raises(ValueError, match="no layer of 'squeezenet1_1' gives a map that a student"):
        stages(small(), 4)


class Twice(nn.Module):
    """One layer that is called at two resolutions, beside one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 3, 2, stride=2), nn.Conv2d(3, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.shared(self.shared(self.first(image))).mean((1, 2, 3))[:, None]


def test_a_layer_that_is_called_twice_is_none() -> None:
    assert stages(network_around(Twice())) == {"first": 3}


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_the_classifier_is_read_and_left_as_it_is(reduction: int) -> None:
    torch.manual_seed(0)
    network = Network("test_resnet").requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    decoder = FeatureDecoder(network.train(), 1, (4, 6), reduction)
    assert network.training
    network.eval()
    image = images()  # 10 x 12
    features = decoder(image, network)
    assert features.shape == (3, 4, -(-10 // reduction), 12 // reduction)
    assert not set(decoder.state_dict()) & set(before)
    features.sum().backward()
    assert all(weight.grad is not None for weight in decoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        for weight in network.backbone.parameters():
            weight.add_(0.1)
    assert not torch.allclose(decoder(image, network), features)
