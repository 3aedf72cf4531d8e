from __future__ import annotations

from functools import cache

import captum.attr
import numpy as np
import pytest
import torch
import torchcam.methods
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.cam import (
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
    last_spatial_layer,
)
from explainers.layers import channels_first


def frozen(backbone: str, num_logits: int = 1) -> Network:
    torch.manual_seed(0)
    return Network(backbone, num_logits).eval().requires_grad_(False)


@cache
def shared(backbone: str) -> Network:
    """A one-logit network for tests that leave it alone."""
    return frozen(backbone)


def images(count: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(1))


def closed_form(activation: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Grad-CAM before global average pooling and a linear layer with one row of weights an image.

    The slope of the score at every position of channel k is w_k / positions.
    """
    mean_slope = weight / activation[0, 0].numel()
    cam = (activation * mean_slope[:, :, None, None]).sum(1, keepdim=True).relu()
    return interpolate(cam, size, mode="bilinear", align_corners=False)[:, 0]


def same_up_to_its_peak(found: Tensor, oracle: Tensor, atol: float = 1e-5) -> None:
    """Agreement to a part of each map's peak: untrained networks give peaks of 1e-11."""
    peak = oracle.amax((1, 2), keepdim=True)
    assert (peak > 0).any()
    assert_close(found / peak.clamp(min=1e-30), oracle / peak.clamp(min=1e-30), atol=atol, rtol=0)


def last_weight(network: Network, name: str) -> Tensor:
    return network.backbone.get_parameter(f"{name}.weight")


def modules_with_hooks(network: Network) -> list[str]:
    named = network.named_modules()
    return [name for name, module in named if module._forward_hooks or module._backward_hooks]


def test_one_logit_by_hand_for_both_classes() -> None:
    network, image = frozen("resnet18"), images(2)
    body = nn.Sequential(*list(network.backbone.children())[:-2])
    activation = body((image.expand(-1, 3, -1, -1) - network.mean) / network.std)
    weight = last_weight(network, "fc")[0] * torch.tensor([[1.0], [-1.0]])
    found = GradCAM(network).saliency(image, torch.tensor([1, 0]))
    same_up_to_its_peak(found, closed_form(activation, weight, (64, 64)))


def test_several_logits_by_hand() -> None:
    network, image, target = frozen("resnet18", 5), images(3), torch.tensor([4, 0, 2])
    body = nn.Sequential(*list(network.backbone.children())[:-2])
    activation = body((image.expand(-1, 3, -1, -1) - network.mean) / network.std)
    weight = last_weight(network, "fc")[target]
    found = GradCAM(network, "layer4").saliency(image, target)
    same_up_to_its_peak(found, closed_form(activation, weight, (64, 64)))


def test_densenets_last_norm_counts_after_its_in_place_relu() -> None:
    network, image, target = frozen("densenet121", 3), images(2), torch.tensor([2, 0])
    activation = network.backbone.get_submodule("features")(
        (image.expand(-1, 3, -1, -1) - network.mean) / network.std
    ).relu()
    weight = last_weight(network, "classifier")[target]
    found = GradCAM(network).saliency(image, target)
    same_up_to_its_peak(found, closed_form(activation, weight, (64, 64)))


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [
        ("resnet18", "layer2"),
        ("resnet18", "layer4"),
        ("mobilenet_v2", "features.7"),
        ("mobilenet_v2", "features"),
        ("vgg16", "features.16"),
        ("vgg16", "features.29"),
        ("densenet121", "features.denseblock3"),
        ("densenet121", "features.denseblock4"),
    ],
)
def test_captums_layer_grad_cam_of_one_image_at_a_time(backbone: str, layer: str) -> None:
    network, image = frozen(backbone).double(), images(2).double()
    oracle = captum.attr.LayerGradCam(network, network.backbone.get_submodule(layer))
    signed = torch.cat(
        [oracle.attribute(one.clone().requires_grad_(), 0) for one in image[:, None]]
    )
    for k, cam in ((1, signed.relu()), (0, (-signed).relu())):
        expected = interpolate(cam.detach(), (64, 64), mode="bilinear")[:, 0]
        found = GradCAM(network, layer).saliency(image, torch.full((2,), k))
        assert_close(found, expected, atol=1e-8 * signed.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg16", "features.29"),
        ("mobilenet_v2", "features"),
        ("densenet121", "features"),
        ("googlenet", "inception5b"),
        ("tf_efficientnet_lite0", "bn2"),
        ("swin_t", "permute"),
    ],
)
def test_the_default_is_the_last_layer_before_pooling(backbone: str, layer: str) -> None:
    network = shared(backbone)
    assert last_spatial_layer(network, images(1)) == layer
    assert modules_with_hooks(network) == []


def test_tokens_have_no_default_layer() -> None:
    network = frozen("test_vit")
    with pytest.raises(ValueError, match=r"'norm' gives \(1, 101, 64\).*Name a layer"):
        GradCAM(network).explain(images(1, 160, 160))
    assert modules_with_hooks(network) == []


class ChannelsLast(nn.Module):
    """A convolution whose map is normalised with its channels last, as in timm's Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.norm = nn.LayerNorm(24)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.patches(image).permute(0, 2, 3, 1))
        return tokens.mean((1, 2))[:, :1]


def test_channels_last_have_no_default_layer() -> None:
    network = frozen("squeezenet1_1")
    network.backbone = ChannelsLast()
    with pytest.raises(ValueError, match=r"'norm' gives \(1, 8, 8, 24\)"):
        GradCAM(network).explain(images(1))
    assert GradCAM(network, "patches").explain(images(1)).shape == (1, 64, 64)


def test_a_map_of_one_position_is_no_default_layer() -> None:
    with pytest.raises(ValueError, match=r"gives \(1, 512, 1, 1\) for an image of \(32, 32\)"):
        GradCAM(shared("resnet18")).explain(images(1, 32, 32))


def test_an_unknown_layer_lists_near_matches() -> None:
    with pytest.raises(ValueError, match=r"no layer 'layer5'; near matches: \['layer4'"):
        GradCAM(shared("resnet18"), "layer5")


def test_a_layer_without_a_map_is_named_and_leaves_no_hook() -> None:
    network = frozen("resnet18")
    with pytest.raises(ValueError, match=r"'fc' gave \(2, 1\); name another layer"):
        GradCAM(network, "fc").explain(images())
    assert modules_with_hooks(network) == []


def test_an_error_in_the_network_leaves_no_hook() -> None:
    network = frozen("resnet18")
    network.backbone.fc = nn.Linear(7, 1)
    for layer in ("layer4", None):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            GradCAM(network, layer).saliency(images(), torch.tensor([0, 1]))
        assert modules_with_hooks(network) == []


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16", "densenet121"])
def test_explain_works_in_inference_mode(backbone: str) -> None:
    explainer, image = GradCAM(shared(backbone)), images()
    expected = explainer.explain(image)
    with torch.inference_mode():
        inside = explainer.explain(image * 1)
    assert_close(inside, expected, atol=0, rtol=1e-4)
    assert not inside.requires_grad


@pytest.mark.parametrize("layer", [None, "layer2"])
def test_the_network_stays_as_it_was(layer: str | None) -> None:
    network, image = frozen("resnet18").train().requires_grad_(True), images()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    GradCAM(network, layer).explain(image)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert modules_with_hooks(network) == []
    assert not image.requires_grad


def test_no_parameter_gradients_even_where_parameters_require_them() -> None:
    network = frozen("resnet18").requires_grad_(True)
    maps = GradCAM(network, "layer3").saliency(images(), torch.tensor([0, 1]))
    assert all(p.grad is None for p in network.parameters())
    assert not maps.requires_grad


@settings(max_examples=4, deadline=None)
@given(
    count=st.integers(1, 3),
    height=st.sampled_from([64, 70]),
    width=st.sampled_from([64, 83]),
    layer=st.sampled_from([None, "layer1", "layer3.0"]),
)
def test_maps_are_non_negative_of_the_images_size_and_free_of_neighbours(
    count: int, height: int, width: int, layer: str | None
) -> None:
    explainer, image = GradCAM(shared("resnet18"), layer), images(count, height, width)
    target = torch.arange(count) % 2
    maps = explainer.saliency(image, target)
    assert maps.shape == (count, height, width)
    assert (maps >= 0).all()
    alone = [explainer.saliency(*one) for one in zip(image[:, None], target[:, None], strict=True)]
    assert_close(maps, torch.cat(alone), atol=1e-6, rtol=1e-4)


def activation_and_slope(
    network: Network, layer: str, image: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """A layer's output and the gradient of the target's logit there, one image at a time."""
    pairs = []
    for one, k in zip(image[:, None], target.tolist(), strict=True):
        kept: list[Tensor] = []

        def keep(
            _module: object, _inputs: object, output: Tensor, into: list[Tensor] = kept
        ) -> None:
            into.append(output)

        handle = network.backbone.get_submodule(layer).register_forward_hook(keep)
        score = network(one.clone().requires_grad_())[0, k]
        handle.remove()
        pairs.append((kept[0].detach()[0], torch.autograd.grad(score, kept[0])[0][0]))
    activation, slope = zip(*pairs, strict=True)
    return torch.stack(activation), torch.stack(slope)


def by_hand(method: type[GradCAM], activation: Tensor, slope: Tensor) -> Tensor:
    """The map of one image before upsampling, channel by channel."""
    total = torch.zeros_like(activation[0])
    for a, g in zip(activation, slope, strict=True):
        if method is GradCAMPlusPlus:
            alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum() * g**3), 0)
            total += (alpha * g.relu()).sum() * a
        elif method is XGradCAM:
            total += (g * a / a.sum()).sum() * a if a.sum() > 0 else 0
        elif method is LayerCAM:
            total += g.relu() * a
        else:
            total += g * a
    return total.relu()


@pytest.mark.parametrize("method", [GradCAMPlusPlus, HiResCAM, XGradCAM, LayerCAM])
@pytest.mark.parametrize("layer", ["layer2", "layer4"])
def test_other_weights_by_hand(method: type[GradCAM], layer: str) -> None:
    network, image = frozen("resnet18", 3).double(), images(3).double()
    target = torch.tensor([2, 0, 1])
    activation, slope = activation_and_slope(network, layer, image, target)
    maps = [by_hand(method, a, g) for a, g in zip(activation, slope, strict=True)]
    oracle = interpolate(torch.stack(maps)[:, None], (64, 64), mode="bilinear")[:, 0]
    same_up_to_its_peak(method(network, layer).explain(image, target), oracle, atol=1e-7)


def test_torchcams_own_plus_plus_leaves_alpha_out() -> None:  # why its weights are ours
    network, image = frozen("resnet18"), images(1)
    activation, slope = activation_and_slope(network, "layer4", image, torch.tensor([0]))
    with torchcam.methods.GradCAMpp(network.backbone, "layer4") as extractor:
        maps = extractor(0, network(image.clone().requires_grad_()), normalized=False)[0]
    squared = (slope**2 * slope.relu()).sum((2, 3), keepdim=True)
    assert_close(maps, (squared * activation).sum(1).relu())


def test_eigen_cam_is_numpys_first_singular_vector() -> None:
    network, image = shared("resnet18"), images(2)
    activation, _ = activation_and_slope(network, "layer3", image, torch.tensor([0, 0]))
    maps = []
    for one in activation.double().numpy():
        matrix = one.reshape(len(one), -1).T
        projected = matrix @ np.linalg.svd(matrix, full_matrices=False)[2][0]
        maps.append(torch.from_numpy(projected * np.sign(projected.sum())).view(one.shape[1:]))
    oracle = interpolate(torch.stack(maps)[:, None], (64, 64), mode="bilinear")[:, 0]
    same_up_to_its_peak(EigenCAM(network, "layer3").explain(image), oracle.float())


def test_the_negative_map_of_one_logit_is_the_other_class_positive_one() -> None:
    network, image = shared("resnet18"), images(2)
    other = GradCAM(network, "layer2").explain(image, torch.tensor([0, 1]))
    negative = GradCAM(network, "layer2", "negative").explain(image, torch.tensor([1, 0]))
    assert_close(negative, other)


@pytest.mark.parametrize(
    ("backbone", "layer", "side"),
    [
        ("vit_b_16", "encoder.layers.encoder_layer_11.ln_1", 224),
        ("test_vit", "blocks.5.norm1", 160),
        ("swin_t", "features.5", 64),
        ("swin_t", "norm", 64),
    ],
)
def test_transformers_have_maps_at_a_named_layer(backbone: str, layer: str, side: int) -> None:
    network, image = shared(backbone), images(1, side, side)
    for method in (GradCAM, EigenCAM):
        maps = method(network, layer).explain(image)
        assert maps.shape == (1, side, side)
        assert maps.std() > 0


def test_tokens_lie_on_the_images_grid() -> None:
    tokens = torch.arange(30.0).view(1, 15, 2)  # a class token and 2 registers, then 3 x 4
    found = channels_first(tokens, "mix", torch.Size([1, 1, 48, 64]))
    assert found[0, 0].tolist() == [[6, 8, 10, 12], [14, 16, 18, 20], [22, 24, 26, 28]]
    last = torch.arange(24.0).view(1, 3, 4, 2)
    assert_close(channels_first(last, "norm", torch.Size([1, 1, 48, 64])), last.movedim(-1, 1))
    with pytest.raises(ValueError, match=r"'mix' gave \(1, 15, 2\)"):
        channels_first(tokens, "mix", torch.Size([1, 1, 48, 52]))
