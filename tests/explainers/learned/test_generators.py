from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from explainers.learned.generators import (
    Folded,
    Geometry,
    PlainUNet,
    ResidualUNet,
    authors_head,
    head,
    padded,
    trainable,
)

UNETS = ["residual", "plain", "resnet18"]


def images(channels: int = 1, height: int = 20, width: int = 27) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "expected"), [(1, 232_244), (3, 232_536)])
def test_the_authors_geometry_has_their_number_of_weights(channels: int, expected: int) -> None:
    unet = ResidualUNet(channels)  # the published counts are of heads with one channel
    whole = nn.Sequential(unet, authors_head(32, 1), authors_head(32, 1))
    assert sum(weight.numel() for weight in trainable(whole)) == expected


def slow_residual_unet(unet: ResidualUNet, image: Tensor) -> Tensor:
    """The authors' geometry, block by block, for three levels in eval mode."""
    parts: Iterator[Tensor] = iter(value for value in unet.state_dict().values() if value.ndim)

    def block(x: Tensor) -> Tensor:
        gain, shift, mean, variance, kernel, bias = (next(parts) for _ in range(6))
        x = F.batch_norm(x, mean, variance, gain, shift)
        return F.conv2d(x.clamp(min=0), kernel, bias, padding=1)

    level0 = block(block(image))
    rest = list(parts)  # six a block: two ways down, two times three residual, two times two up
    parts = iter([*rest[:6], *rest[12:30], *rest[6:12], *rest[30:48], *rest[60:], *rest[48:60]])
    pooled = F.max_pool2d(block(level0), 2)
    level1 = pooled + block(block(block(pooled)))
    pooled = F.max_pool2d(block(level1), 2)
    level2 = pooled + block(block(block(pooled)))
    up = block(block(level2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    up = block(block(torch.cat([up, level1], 1))).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert next(parts, None) is None
    return torch.cat([up, level0], 1)


def test_the_authors_geometry_like_its_slow_rewrite() -> None:
    torch.manual_seed(0)
    unet = ResidualUNet(1, (4, 6, 8))
    unet(images())  # moves the statistics of the batch norms away from 0 and 1
    unet.eval()
    image = images(1, 16, 24)
    assert_close(unet(image), slow_residual_unet(unet, image))


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (20, 27), (5, 3)])
def test_features_have_the_size_of_the_image(
    unet: str, channels: Literal[1, 3], size: tuple[int, int]
) -> None:
    network, features = Geometry(unet, (4, 6, 8, 10), channels).build()
    assert network.eval()(images(channels, *size)).shape == (2, features, *size)


@pytest.mark.parametrize("unet", UNETS)
def test_every_weight_takes_part(unet: str) -> None:
    torch.manual_seed(0)
    network, _ = Geometry(unet, (4, 6, 8)).build()
    assert all(weight.grad is None for weight in network.parameters())
    network(images(1, 64, 64)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trainable(network))


def test_an_encoders_unused_layers_are_frozen() -> None:
    network, _ = Geometry("resnet18", (4, 6, 8)).build()
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert {name.split(".")[2] for name in frozen} == {"layer3", "layer4"}


def test_padding_repeats_edges_and_is_cut_off_again() -> None:
    seen: list[Tensor] = []

    def network(image: Tensor) -> Tensor:
        seen.append(image)
        return 2 * image

    image = images(1, 3, 4)
    assert_close(padded(network, image, 4), 2 * image)
    assert seen[0].shape == (2, 1, 4, 4)
    assert_close(seen[0][:, :, 3], image[:, :, 2])
    padded(network, image[:, :, :2], 2)
    assert seen[1].shape == (2, 1, 2, 4)


def test_plain_unet_like_its_slow_rewrite() -> None:
    torch.manual_seed(0)
    unet = PlainUNet(1, (4, 6))
    unet(images())
    unet.eval()
    parts = iter(value for value in unet.state_dict().values() if value.ndim)

    def double(x: Tensor) -> Tensor:
        for _ in range(2):
            kernel, gain, shift, mean, variance = (next(parts) for _ in range(5))
            x = F.batch_norm(F.conv2d(x, kernel, padding=1), mean, variance, gain, shift).relu()
        return x

    image = images(1, 8, 12)
    level0 = double(image)
    level1 = F.interpolate(double(F.max_pool2d(level0, 2)), scale_factor=2.0, mode="bilinear")
    assert_close(unet(image), double(torch.cat([level1, level0], 1)))
    assert next(parts, None) is None


@pytest.mark.parametrize("convolutions", [1, 2, 5])
def test_a_head_has_as_many_convolutions_as_asked_for(convolutions: int) -> None:
    kernels = [weight for weight in head(8, 3, convolutions).parameters() if weight.ndim == 4]
    assert [kernel.shape[2:] for kernel in kernels] == [(3, 3)] * convolutions
    assert head(8, 3, convolutions)(torch.rand(2, 8, 5, 6)).shape == (2, 3, 5, 6)


def test_the_authors_head_has_no_activation_between() -> None:
    network = authors_head(8, 1)
    assert [len(weight) for weight in network.parameters() if weight.ndim == 4] == [32, 16, 1]
    one, two = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)
    nothing = torch.zeros_like(one)
    assert_close(network(one) + network(two), network(one + two) + network(nothing))


def test_clip_cuts_and_passes_the_gradient_outside() -> None:
    values = torch.tensor([-3.7, -1e-3, 0.25, 1.0, 5.3, 1e6], requires_grad=True)
    image = torch.full((1, 1, 1, 6), 0.5)
    clipped = Geometry(output="clip").draw(values.view_as(image), image)
    assert clipped.flatten().tolist() == [0.0, 0.0, 0.25, 1.0, 1.0, 1.0]
    torch.autograd.backward(clipped.sum())
    assert_close(values.grad, torch.ones(6))


def test_delta_is_added_to_the_image() -> None:
    values = torch.tensor([-3.7, -0.25, 0.25, 5.3], requires_grad=True)
    image = torch.full((1, 1, 1, 4), 0.5)
    drawn = Geometry(output="delta").draw(values.view_as(image), image)
    assert drawn.flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    torch.autograd.backward(drawn.sum())
    assert_close(values.grad, torch.ones(4))


def test_sigmoid_squashes() -> None:
    values = torch.tensor([0.0, log(3)]).view(1, 1, 1, 2)
    drawn = Geometry().draw(values, torch.zeros(1, 1, 1, 2))
    assert_close(drawn.flatten(), torch.tensor([0.5, 0.75]))


def test_folded_blocks_by_hand() -> None:
    """Sides 3 and 5 in blocks of 2: an edge is repeated, channel by channel."""
    image = images(2, 3, 5)
    folded = Folded(2)(image)
    assert folded.shape == (2, 8, 2, 3)
    for channel in range(2):
        for y in range(4):
            for x in range(6):
                value = folded[:, 4 * channel + 2 * (y % 2) + x % 2, y // 2, x // 2]
                assert value.equal(image[:, channel, min(y, 2), min(x, 4)])


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize("unet", UNETS)
def test_a_reduced_geometry_draws_images_of_any_size(unet: str, reduction: int) -> None:
    geometry = Geometry(unet, (4, 6), output="delta", reduction=reduction)
    network, features = geometry.build()
    image = images(1, 37, 50)
    output = geometry.head(features)(network(image))
    assert output.shape[2:] == (-(-37 // reduction), -(-50 // reduction))
    drawn = geometry.draw(output, image)
    assert drawn.shape == image.shape
    assert (drawn - image).abs().max() < 0.5  # the head starts small
    flat = geometry.draw(torch.full_like(output, 0.1), image / 2)
    assert_close(flat, image / 2 + 0.1)


def test_what_is_added_is_resized_bilinearly() -> None:
    geometry = Geometry(output="delta", reduction=2)
    image, output = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, 1, 2, 2)
    output[0, 0, 0, 0] = 0.16
    across = torch.tensor([1, 0.75, 0.25, 0])  # half-pixel centres, edges held
    assert_close(geometry.draw(output, image)[0, 0] - 0.5, 0.16 * across[:, None] * across)


def test_reduction_saves_multiplications() -> None:
    counts = []
    for geometry in (Geometry(output="delta"), Geometry(output="delta", reduction=2)):
        network, _ = geometry.build()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images(1, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.27 * counts[0]


def test_wrong_geometry_is_named() -> None:
    with pytest.raises(ValueError, match=r"widths of a U-Net .* got \(16,\)"):
        Geometry(widths=(16,))
    with pytest.raises(ValueError, match="but got 'resnet19'"):
        Geometry("resnet19").build()
    with pytest.raises(ValueError, match=r"reduction must be 1.* got 2 with 'sigmoid'"):
        Geometry(reduction=2)
    with pytest.raises(ValueError, match=r"reduction must be 1.* got 0 with 'delta'"):
        Geometry(output="delta", reduction=0)
