from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, network_around, small
from torch import Tensor, nn
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.gradient import (
    Gradient,
    GradientSHAP,
    InputXGradient,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradIG,
    noise_fields,
)
from explainers.attribution.scores import ClassScores, gradients_on
from explainers.base import Explainer

NAMES = ["gradient", "smoothgrad", "integrated"]


class Plain(nn.Module):
    """Sum of a power of the pixels, so that every derivative is known by hand."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.largest_batch = 0
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.largest_batch = max(self.largest_batch, len(image))
        self.seen.append(image.detach())
        return (image**self.power).flatten(1).sum(1, keepdim=True)


def plain(power: int) -> Network:
    network = network_around(Plain(power))
    network.mean.zero_()
    network.std.fill_(1.0)
    return network


def build(name: str, network: Network, work_batch: int = 64) -> Explainer:
    if name == "gradient":
        return Gradient(network)
    if name == "smoothgrad":
        return SmoothGrad(network, samples=5, work_batch=work_batch)
    return IntegratedGradients(network, steps=5, work_batch=work_batch)


def test_a_single_logit_scores_minus_z_and_z() -> None:
    network, image = small(), images()
    scores = ClassScores(network)(image)
    assert_close(scores, torch.stack([-network(image)[:, 0], network(image)[:, 0]], 1))


def test_several_logits_are_the_scores() -> None:
    network, image = small(3), images()
    assert_close(ClassScores(network)(image), network(image))


def test_gradient_by_hand() -> None:  # z = 3 x^2 for a grey image: slope 6 x, for either class
    image = images(2)
    maps = Gradient(plain(2)).saliency(image, torch.tensor([0, 1]))
    assert_close(maps, 6 * image[:, 0])


def test_gradient_passes_the_normalisation() -> None:  # z = sum over RGB of (x - mean) / std
    network = network_around(Plain(1))
    expected = (1 / network.std).sum().item()
    maps = Gradient(network).saliency(images(), torch.tensor([1, 0, 1]))
    assert_close(maps, torch.full((3, 10, 12), expected))


def test_gradient_is_captums_saliency_of_one_image_at_a_time() -> None:
    network, image, target = small(4), images(channels=3), torch.tensor([2, 0, 3])
    maps = Gradient(network).saliency(image, target)
    for one, k, found in zip(image[:, None], target.tolist(), maps, strict=True):
        oracle = captum.attr.Saliency(network).attribute(one.clone().requires_grad_(), k, abs=False)
        assert_close(found, oracle[0].sum(0).abs())


def test_integrated_gradients_by_hand() -> None:  # z = 3 x^3: the path integral times x is 3 x^3
    image = images(2)
    maps = IntegratedGradients(plain(3)).saliency(image, torch.tensor([0, 1]))
    assert_close(maps, 3 * image[:, 0] ** 3)


def test_integrated_gradients_are_captums_of_one_image_at_a_time() -> None:
    network, image, target = small(4), images(channels=3), torch.tensor([2, 0, 3])
    maps = IntegratedGradients(network, steps=20, work_batch=7).saliency(image, target)
    for one, k, found in zip(image[:, None], target.tolist(), maps, strict=True):
        oracle = captum.attr.IntegratedGradients(network).attribute(one, target=k, n_steps=20)
        assert_close(found, oracle[0].sum(0).abs())


def test_integrated_gradients_of_a_black_image_are_zero() -> None:
    maps = IntegratedGradients(small()).saliency(torch.zeros(1, 1, 10, 12), torch.tensor([1]))
    assert_close(maps, torch.zeros(1, 10, 12))


def test_input_x_gradient_by_hand() -> None:  # z = 3 x^2: slope 6 x, times x
    image = images(2)
    maps = InputXGradient(plain(2)).saliency(image, torch.tensor([0, 1]))
    assert_close(maps, 6 * image[:, 0] ** 2)


def test_gradient_shap_is_captums_without_noise() -> None:
    network, image, target = small(3), images(channels=3), torch.tensor([2, 0, 1])
    found = GradientSHAP(network, samples=3000, noise=0).saliency(image, target)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  captum draws from it
    oracle = captum.attr.GradientShap(ClassScores(network))
    expected = oracle.attribute(image, torch.zeros_like(image[:1]), 3000, target=target)
    expected = expected.sum(1).abs()  # both estimates err by about 1 % of the largest value
    assert_close(found, expected, atol=0.04 * float(expected.max()), rtol=0)


def test_gradient_shap_of_a_square_by_hand() -> None:  # slope 6 a x at a share a, times x
    image, shares = images(2), torch.rand(4, generator=torch.Generator().manual_seed(7))
    maps = GradientSHAP(plain(2), samples=4, noise=0, seed=7).saliency(image, torch.tensor([1, 1]))
    assert_close(maps, 6 * shares.mean() * image[:, 0] ** 2)


def test_smoothgrad_ig_is_the_slow_loop() -> None:
    network, image, target = small(3), images(channels=3), torch.tensor([2, 0, 1])
    explainer = SmoothGradIG(network, samples=3, steps=5, noise=0.2, seed=5, work_batch=7)
    maps = explainer.saliency(image, target)
    fields = torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(5))
    oracle = captum.attr.IntegratedGradients(ClassScores(network))
    for one, k, found in zip(image, target.tolist(), maps, strict=True):
        noisy = one + 0.2 * (one.max() - one.min()) * fields
        total = sum(oracle.attribute(copy[None], target=k, n_steps=5)[0] for copy in noisy)
        assert_close(found, (total / 3).sum(0).abs().float(), atol=1e-6, rtol=1e-4)


def test_smoothgrad_is_the_slow_loop() -> None:
    network, image, target = small(2), images(channels=3), torch.tensor([1, 0, 1])
    maps = SmoothGrad(network, samples=4, noise=0.3, seed=5, work_batch=5).saliency(image, target)
    generator = torch.Generator().manual_seed(5)
    fields = torch.randn(4, 3, 10, 12, generator=generator)
    for one, k, found in zip(image, target.tolist(), maps, strict=True):
        total = torch.zeros_like(one)
        for field in fields:
            noisy = (one + 0.3 * (one.max() - one.min()) * field).requires_grad_()
            total += torch.autograd.grad(network(noisy[None])[0, k], noisy)[0]
        assert_close(found, (total / 4).sum(0).abs())


def test_smoothgrads_noise_is_a_share_of_each_images_own_range() -> None:
    network = plain(1)
    image = images(2) * torch.tensor([1.0, 0.1])[:, None, None, None]
    SmoothGrad(network, samples=50, noise=0.15).saliency(image, torch.tensor([1, 1]))
    assert isinstance(network.backbone, Plain)
    noisy = torch.cat(network.backbone.seen)[:, :1].view(2, 50, 10, 12)
    ranges = image.amax((1, 2, 3)) - image.amin((1, 2, 3))
    assert_close((noisy - image).std((1, 2, 3)) / ranges, torch.full((2,), 0.15), rtol=0.05, atol=0)


def test_smoothgrad_of_a_constant_image_is_its_gradient() -> None:
    network, image, target = small(), torch.full((1, 1, 10, 12), 0.4), torch.tensor([1])
    expected = Gradient(network).saliency(image, target)
    assert_close(SmoothGrad(network).saliency(image, target), expected)


def test_smoothgrad_draws_from_its_own_seed_only() -> None:
    network, image, target = small(), images(), torch.tensor([1, 1, 0])
    before = torch.get_rng_state()
    maps = [SmoothGrad(network, 3, seed=seed).saliency(image, target) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


def test_noise_fields_are_standard_normal() -> None:
    fields = noise_fields(40, torch.zeros(1, 3, 20, 20), 0)
    assert fields.shape == (40, 3, 20, 20)
    assert_close(
        torch.stack([fields.mean(), fields.std()]), torch.tensor([0.0, 1.0]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("name", ["smoothgrad", "integrated"])
@settings(max_examples=8, deadline=None)
@given(work_batch=st.integers(1, 20), count=st.integers(1, 4))
def test_work_batches_bound_the_forwards_and_change_nothing(
    name: str, work_batch: int, count: int
) -> None:
    network, image, target = plain(2), images(count), torch.ones(count, dtype=torch.long)
    whole = build(name, network).saliency(image, target)
    assert isinstance(network.backbone, Plain)
    network.backbone.largest_batch = 0
    assert_close(build(name, network, work_batch).saliency(image, target), whole)
    assert network.backbone.largest_batch <= work_batch


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_in_the_batch_change_nothing(name: str) -> None:
    explainer, image, target = build(name, small()), images(), torch.tensor([1, 0, 1])
    alone = [explainer.saliency(*one) for one in zip(image[:, None], target[:, None], strict=True)]
    assert_close(explainer.saliency(image, target), torch.cat(alone))


@pytest.mark.parametrize("name", ["gradient", "integrated"])
def test_a_grey_image_and_its_rgb_copy_get_the_same_map(name: str) -> None:
    explainer, image, target = build(name, small()), images(), torch.tensor([1, 0, 1])
    grey = explainer.saliency(image, target)
    assert_close(explainer.saliency(image.repeat(1, 3, 1, 1), target), grey)


@pytest.mark.parametrize("name", NAMES)
def test_explain_works_in_inference_mode(name: str) -> None:
    explainer, image = build(name, small()), images()
    expected = explainer.explain(image)
    with torch.inference_mode():
        inside = explainer.explain(image * 1)
    assert_close(inside, expected)
    assert not inside.requires_grad
    assert (expected.amax((1, 2)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_network_and_the_image_stay_as_they_were(name: str) -> None:
    network, image = small().train().requires_grad_(True), images()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    kept = image.clone()
    build(name, network).explain(image)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in network.modules())
    assert torch.equal(image, kept)
    assert not image.requires_grad
    assert image.grad is None


def test_no_parameter_gradients_even_where_parameters_require_them() -> None:
    network = small().requires_grad_(True)
    for name in NAMES:
        maps = build(name, network).saliency(images(), torch.tensor([1, 0, 1]))
        assert not maps.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_gradients_on_leaves_inference_mode_and_comes_back() -> None:
    with torch.inference_mode():
        image, target = images(), torch.tensor([1, 0, 1])
        with gradients_on(image, target) as (free, wanted):
            assert torch.is_grad_enabled()
            assert not free.is_inference()
            assert not wanted.is_inference()
        assert torch.is_inference_mode_enabled()


def test_settings_out_of_range_are_named() -> None:
    network = small()
    with pytest.raises(ValueError, match="samples must be 1 or more, but got 0"):
        SmoothGrad(network, samples=0)
    with pytest.raises(ValueError, match=r"noise must be 0 or more, but got -0\.1"):
        SmoothGrad(network, noise=-0.1)
    with pytest.raises(ValueError, match="steps must be 1 or more, but got 0"):
        IntegratedGradients(network, steps=0)
    with pytest.raises(ValueError, match="work_batch must be 1 or more, but got 0"):
        IntegratedGradients(network, work_batch=0)
