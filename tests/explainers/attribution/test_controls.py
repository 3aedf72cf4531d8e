from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, sobel
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.testing import assert_close

from classifiers.network import Network
from datamodules.base import Batch
from explainers.attribution.controls import (
    CentredGaussian,
    EdgeMap,
    MeanMask,
    RandomMap,
    mean_mask,
)
from explainers.base import Explainer

NETWORK = Network("squeezenet1_1").eval()
NAMES = ["random", "gaussian", "mean mask", "edges"]


def images(count: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 24, 32, generator=torch.Generator().manual_seed(1))


def build(name: str) -> Explainer:
    if name == "random":
        return RandomMap(NETWORK)
    if name == "gaussian":
        return CentredGaussian(NETWORK)
    if name == "edges":
        return EdgeMap(NETWORK)
    return MeanMask(NETWORK, torch.arange(24 * 32).view(24, 32) / (24 * 32))


def maps_of(explainer: Explainer, image: Tensor) -> Tensor:
    return explainer.saliency(image, torch.ones(len(image), dtype=torch.long))


def batch(mask: Tensor, has_mask: list[bool]) -> Batch:
    count = len(mask)
    return {
        "image": torch.rand(count, 1, *mask.shape[1:]),
        "label": torch.ones(count, dtype=torch.long),
        "mask": mask,
        "has_mask": torch.tensor(has_mask),
        "id": [str(k) for k in range(count)],
        "columns": {},
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_control_ignores_target_neighbours_and_classifier(name: str, channels: int) -> None:
    explainer, image = build(name), images(channels=channels)
    maps = maps_of(explainer, image)
    assert maps.shape == (3, 24, 32)
    assert_close(explainer.saliency(image, torch.zeros(3, dtype=torch.long)), maps)
    assert_close(torch.cat([maps_of(explainer, one) for one in image[:, None]]), maps)
    explainer.network = Network("squeezenet1_1").eval()
    with torch.inference_mode():
        assert_close(explainer.explain(image), maps)


def test_random_maps_find_a_mask_by_its_share_alone() -> None:
    mask = np.zeros((24, 32), dtype=bool)
    mask[3:15, 4:20] = True  # a quarter of the pixels
    maps = maps_of(RandomMap(NETWORK), images(40)).numpy()
    scores = [average_precision_score(mask.ravel(), one.ravel()) for one in maps]
    assert np.mean(scores) == pytest.approx(0.25, abs=0.02)


def test_random_maps_differ_between_images_and_seeds_and_repeat_otherwise() -> None:
    image = images(2)
    first, again, other = (maps_of(RandomMap(NETWORK, seed), image) for seed in (0, 0, 1))
    assert_close(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])
    assert 0 <= first.min() < first.max() < 1


def test_random_maps_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    maps_of(RandomMap(NETWORK), images())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_maps_are_the_same_where_only_the_last_bit_differs() -> None:
    image = (images() * 255).round() / 255
    assert_close(
        maps_of(RandomMap(NETWORK), image), maps_of(RandomMap(NETWORK), image * (1 + 1e-6))
    )


def test_centred_gaussian_by_hand() -> None:  # sigma 3 rows and 5 columns around (4, 7)
    found = maps_of(CentredGaussian(NETWORK, 1 / 3), torch.zeros(2, 1, 9, 15))
    expected = torch.tensor([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-1.0)])
    assert_close(found[0][[4, 1, 4, 7], [7, 7, 12, 2]], expected)
    assert_close(found[0], found[1])
    assert_close(found, found.flip(1, 2))


def test_mean_mask_by_hand() -> None:
    first = torch.tensor([[[1, 0], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]]).bool()
    second = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 0]]]).bool()
    batches = [batch(first, [True, True, False]), batch(second, [True, True])]
    assert_close(mean_mask(batches), torch.tensor([[0.75, 0.5], [0.0, 0.0]]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 9), size=st.integers(1, 4))
def test_mean_mask_is_numpys_mean_however_it_is_batched(seed: int, count: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    mask, annotated = generator.random((count, 3, 5)) < 0.5, generator.random(count) < 0.7
    annotated[0] = True
    starts = range(0, count, size)
    parts = [(mask[k : k + size], annotated[k : k + size].tolist()) for k in starts]
    found = mean_mask(batch(torch.from_numpy(m), has) for m, has in parts)
    np.testing.assert_allclose(found.numpy(), mask[annotated].mean(0), rtol=1e-6)


def test_mean_mask_without_annotation_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one annotated training image, but got none"):
        mean_mask([batch(torch.zeros(2, 3, 3, dtype=torch.bool), [False, False])])


def test_mean_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"size \(4, 4\), but the images have \(24, 32\)"):
        maps_of(MeanMask(NETWORK, torch.zeros(4, 4)), images())


def test_edges_by_hand() -> None:  # a step from 0 to 1: both columns beside it have slope 1/2
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 1
    found = maps_of(EdgeMap(NETWORK, blur=0), image)[0]
    expected = torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0]).expand(8, 8)
    assert_close(found, expected, atol=2e-3, rtol=0)


def test_edges_are_scipys() -> None:
    image = images(channels=3)
    found = maps_of(EdgeMap(NETWORK, blur=0.05), image)
    for one, grey in zip(found.numpy(), image.mean(1).numpy(), strict=True):
        edges = np.hypot(sobel(grey, 0, mode="nearest"), sobel(grey, 1, mode="nearest")) / 8
        blurred = gaussian_filter(edges, 0.05 * 24, mode="mirror", radius=round(3 * 0.05 * 24))
        np.testing.assert_allclose(one, blurred, atol=1e-4)


def test_a_sigma_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="sigma must be above 0, but got 0"):
        CentredGaussian(NETWORK, sigma=0)
    with pytest.raises(ValueError, match=r"but got 0\.5"):
        maps_of(EdgeMap(NETWORK, blur=0.5), images())
