from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import network_around
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution.masks import (
    BBMP,
    ExtremalPerturbation,
    at_blur,
    grid,
    smooth_max,
    sorted_mask,
    variation,
)
from explainers.attribution.perceptual import PerceptualPerturbation, lbfgs, lead
from explainers.views import blurred


class Spot(nn.Module):
    """Looks at a pattern of stripes in one corner of the image and nowhere else."""

    def forward(self, image: Tensor) -> Tensor:
        corner = image.mean(1)[:, 4:12, 4:12]
        edges = corner.diff(dim=2).abs().mean((1, 2))
        return (20 * edges - 4)[:, None]


def spot() -> Network:
    network = network_around(Spot())
    network.mean.zero_()
    network.std.fill_(1.0)
    return network


def striped(count: int = 2) -> Tensor:
    stripes = (torch.arange(32) % 4 < 2).float().expand(count, 1, 32, 32)
    return stripes + 0.01 * torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def inside(maps: Tensor) -> Tensor:
    """Share of each map's sum that lies in the corner."""
    return maps[:, 2:14, 2:14].sum((1, 2)) / maps.sum((1, 2))


def test_bbmp_blurs_what_the_network_looks_at() -> None:
    network, image = spot(), striped()
    maps = BBMP(network, steps=60, cell=0.1, area=1e-2, blur=0.1, jitter=0).explain(image)
    assert (inside(maps) > 0.5).all()  # of a corner that is 14 % of the image
    large = (1 - maps)[:, None]
    mixed = large * image + (1 - large) * blurred(image, 0.1)
    assert (network(image) > 1).all()
    assert (network(mixed) < 0).all()


def test_bbmp_of_what_the_network_does_not_look_at_goes_away() -> None:
    class Blind(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.mean((1, 2, 3))[:, None] * 0 + 1

    maps = BBMP(network_around(Blind()), steps=40, cell=0.2, area=1e-2).explain(striped())
    assert_close(maps, torch.zeros(2, 32, 32), atol=1e-3, rtol=0)


def test_extremal_masks_keep_what_the_network_looks_at_in_their_area() -> None:
    explainer = ExtremalPerturbation(
        spot(), areas=(0.1, 0.2), steps=80, learning_rate=0.02, cell=0.1, sigma=0.08, blur=0.2
    )
    maps = explainer.explain(striped())
    assert (inside(maps) > 0.6).all()
    assert_close(maps.mean((1, 2)), torch.full((2,), 0.3), atol=0.08, rtol=0)


def test_perceptual_perturbation_moves_the_margin_and_stays_near() -> None:
    network, image = spot(), striped()
    maps = PerceptualPerturbation(network, steps=60, blur=0).explain(image)
    assert (inside(maps) > 0.95).all()
    target = network.decide(image)
    with torch.enable_grad():
        changed = PerceptualPerturbation(network, steps=60)._perturb(image, target)
    pairs = F.pad(network(changed), (1, 0))
    assert_close(lead(pairs, target), torch.full((2,), -2.0), atol=0.1, rtol=0)


def test_blur_is_scipys() -> None:
    image = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    oracle = [gaussian_filter(one[0].numpy(), 2.0, mode="mirror", truncate=3.0) for one in image]
    assert_close(blurred(image, 0.1)[:, 0], torch.from_numpy(np.stack(oracle)), atol=1e-5, rtol=0)


def test_variation_by_hand() -> None:  # |1 - 0|^3 + |3 - 1|^3 across, |1 - 0|^3 + |3 - 1|^3 down
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 3.0]]]])
    assert variation(mask, 3.0).item() == 1 + 8 + 1 + 8


def test_a_sorted_mask_has_its_area() -> None:
    assert sorted_mask(0.3, 10).tolist() == [0.0] * 7 + [1.0] * 3


def test_grid_follows_the_images_proportions() -> None:
    assert grid(torch.zeros(1, 1, 224, 448), 4 / 224) == (56, 112)
    assert grid(torch.zeros(1, 1, 8, 8), 0.9) == (2, 2)


def test_smooth_max_is_the_slow_loop_and_near_the_maximum() -> None:
    values = torch.rand(2, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    found = smooth_max(values, 1.0, 0.1)
    padded = F.pad(values, (2, 2, 2, 2))
    for k in range(2):
        for y in range(6):
            for x in range(7):
                around = [
                    padded[k, 0, y + 2 + i, x + 2 + j] * np.exp(-(i * i + j * j) / 2)
                    for i in range(-2, 3)
                    for j in range(-2, 3)
                ]
                part = torch.stack(around)
                weight = (part / 0.1).exp()
                expected = (part * weight).sum() / weight.sum()
                assert_close(found[k, 0, y, x], expected)
    sharp = smooth_max(values, 1.0, 1e-3)
    bell = torch.tensor(
        [[np.exp(-(i * i + j * j) / 2) for j in range(-2, 3)] for i in range(-2, 3)]
    )
    patches = F.unfold(values, 5, padding=2) * bell.flatten()[:, None].float()
    assert_close(sharp, patches.amax(1).view_as(values), atol=1e-3, rtol=0)


def test_levels_of_blur_are_interpolated() -> None:
    pyramid = torch.tensor([10.0, 20.0, 40.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 4)
    level = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 1, 4)
    assert at_blur(pyramid, level).flatten().tolist() == [10.0, 15.0, 20.0, 40.0]


def test_lbfgs_finds_the_bottom_of_every_bowl_alone_and_together() -> None:
    centre = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    scale = torch.tensor([1.0, 30.0, 0.02]).double()[:, None] * torch.arange(1, 6)
    start = torch.zeros(3, 5).double()
    together = lbfgs(lambda x: (scale * (x - centre) ** 2).sum(1), start, 60)
    assert_close(together, centre, atol=1e-4, rtol=0)
    alone = [
        lbfgs(lambda x, k=k: (scale[k] * (x - centre[k]) ** 2).sum(1), start[k : k + 1], 60)
        for k in range(3)
    ]
    assert_close(together, torch.cat(alone))


def test_lbfgs_goes_down_the_valley_of_rosenbrock_as_torchs_does() -> None:
    def valley(point: Tensor) -> Tensor:
        x, y = point[:, 0], point[:, 1]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    start = torch.tensor([[-1.2, 1.0]]).double()
    found = lbfgs(valley, start, 80)
    free = start.clone().requires_grad_()
    oracle = torch.optim.LBFGS([free], max_iter=80, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        oracle.zero_grad()
        loss = valley(free).sum()
        loss.backward()
        return loss

    oracle.step(closure)
    assert_close(free.detach(), torch.ones(1, 2).double(), atol=1e-3, rtol=0)
    assert_close(found, torch.ones(1, 2).double(), atol=1e-3, rtol=0)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"areas are shares .* but got \(0\.1, 1\.0\)"):
        ExtremalPerturbation(spot(), areas=(0.1, 1.0))
    with pytest.raises(ValueError, match="levels must be 2 or more, but got 1"):
        ExtremalPerturbation(spot(), levels=1)
    for method in (BBMP, ExtremalPerturbation, PerceptualPerturbation):
        with pytest.raises(ValueError, match="steps must be 1 or more, but got 0"):
            method(spot(), steps=0)
