from __future__ import annotations

import pytest
import torch
from networks import images, network_around, small
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.ablation import AblationCAM, ScoreCAM
from explainers.attribution.scores import ClassScores
from explainers.layers import raw_output

LAYER, TARGET = "features.2", torch.tensor([2, 0, 1])  # after the first, in-place ReLU


def up(maps: Tensor) -> Tensor:
    return interpolate(maps[:, None], (10, 12), mode="bilinear", align_corners=False)[:, 0]


def test_score_cam_is_the_slow_loop() -> None:
    network, image = small(3), images()
    scores, activation = ClassScores(network), raw_output(network, LAYER, image)
    expected = []
    for one, k, channels in zip(image, TARGET.tolist(), activation, strict=True):
        normalised, change = network.normalised(one[None]), []
        for channel in channels:
            mask = (channel - channel.min()) / (channel.max() - channel.min() + 1e-8)
            masked = network.backbone(normalised * mask)[0, k]
            change.append(masked - scores(one[None])[0, k])
        weight = torch.stack(change).softmax(0)
        expected.append((weight[:, None, None] * channels).sum(0).relu())
    found = ScoreCAM(network, LAYER, work_batch=4).explain(image, TARGET)
    assert_close(found, torch.stack(expected))  # the layer has the image's size


def slow_ablation(network: Network, layer: str, image: Tensor, target: Tensor) -> Tensor:
    scores, maps = ClassScores(network), []
    for one, k in zip(image[:, None], target.tolist(), strict=True):
        activation, whole = raw_output(network, layer, one), scores(one)[0, k]
        total = torch.zeros_like(activation[0, 0])
        for channel in range(activation.shape[1]):
            without = activation.clone()
            without[:, channel] = 0
            module = network.backbone.get_submodule(layer)
            handle = module.register_forward_hook(lambda *_, output=without: output)
            weight = (whole - scores(one)[0, k]) / whole.abs()
            handle.remove()
            total += weight * activation[0, channel]
        maps.append(total.relu())
    return up(torch.stack(maps))


def test_ablation_cam_is_the_slow_loop() -> None:
    network, image = small(3), images()
    found = AblationCAM(network, LAYER, work_batch=4).explain(image, TARGET)
    assert_close(found, slow_ablation(network, LAYER, image, TARGET))


class Beside(nn.Module):
    """What the layer gives is added to, or put beside, what came before it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.form, self.head = form, nn.Linear(4 if form == "added" else 8, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        y = self.second(x.relu()).relu_()
        z = x + y if self.form == "added" else torch.cat([x, y], 1)
        logits: Tensor = self.head(z.relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("form", ["added", "beside"])
def test_ablation_cam_where_the_layer_is_one_of_two_branches(form: str) -> None:
    torch.manual_seed(1)
    network, image = network_around(Beside(form)), images()
    target = torch.tensor([1, 0, 1])
    found = AblationCAM(network, "second", sign="positive").explain(image, target)
    assert_close(found, slow_ablation(network, "second", image, target), atol=1e-6, rtol=1e-4)
    assert found.max() > 0


class Tokens(nn.Module):
    """Patches as tokens (b, 1 + n, channels) behind a class token, or as a map, channels last."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.patches, self.form = nn.Conv2d(3, 5, 2, 2), form
        self.mix, self.head = nn.Identity(), nn.Linear(5, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).relu()
        if self.form == "tokens":
            x = x.flatten(2).mT
            x = self.mix(torch.cat([torch.ones_like(x[:, :1]), x], 1))
            logits: Tensor = self.head(x[:, 1:].mean(1))
        else:
            logits = self.head(self.mix(x.movedim(1, -1)).mean((1, 2)))
        return logits


@pytest.mark.parametrize("form", ["tokens", "last"])
def test_tokens_and_channels_last_are_maps_too(form: str) -> None:
    torch.manual_seed(1)
    network, image, target = network_around(Tokens(form), 2), images(), torch.tensor([1, 0, 1])
    for method in (AblationCAM, ScoreCAM):
        expected = method(network, "patches").explain(image, target)
        if method is AblationCAM:  # whose channels are left out before the ReLU here
            network.backbone.mix = nn.Identity()
            activation = raw_output(network, "patches", image).relu()
            score = ClassScores(network)(image).gather(1, target[:, None])
            weight = network.backbone.head.weight[target] * activation.mean((2, 3)) / score.abs()
            expected = up((weight[:, :, None, None] * activation).sum(1).relu())
            assert_close(method(network, "mix").explain(image, target), expected)
        assert method(network, "mix").explain(image, target).shape == (3, 10, 12)


def test_a_layer_without_a_map_is_named() -> None:
    for method in (AblationCAM, ScoreCAM):
        with pytest.raises(ValueError, match=r"'head' gave \(3, 3\); name another layer"):
            method(small(3), "head").explain(images())
        with pytest.raises(ValueError, match=r"no layer 'features\.9'"):
            method(small(3), "features.9")
        with pytest.raises(ValueError, match="work_batch must be 1 or more, but got 0"):
            method(small(3), LAYER, work_batch=0)
