"""Scaling of maps by hand values, numpy and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from explainers.evaluation.metrics.scaling import (
    known,
    min_max,
    region_min_max,
    set_range,
    set_wide,
    superpixels,
    tiles,
)


def test_min_max_of_ordinary_constant_and_unknown_maps() -> None:
    nan = math.nan
    maps = torch.tensor(
        [[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]], [[nan, 2.0], [4.0, 2.0]]]
    )
    scaled = torch.tensor([[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]], [[0, 0], [1, 0]]])
    assert_close(min_max(maps), scaled)
    assert not known(torch.full((1, 2, 2), nan)).any()


def test_set_range_is_numpys_percentile_of_all_pixels() -> None:
    maps = torch.randn(5, 8, 8).mul(3)
    maps[0, 0, 0] = math.nan
    expected = np.nanpercentile(maps.double().numpy(), [1, 99])
    assert set_range([maps[:2], maps[2:]]) == pytest.approx(tuple(expected), rel=1e-6)
    with pytest.raises(ValueError, match="at least one map"):
        set_range([])


def test_the_z_score_changes_nothing_set_wide() -> None:
    maps = torch.rand(4, 6, 6).double()
    z_score = (maps - maps.mean()) / maps.std()
    assert_close(set_wide(z_score, set_range([z_score])), set_wide(maps, set_range([maps])))


def test_set_wide_keeps_maps_comparable() -> None:
    """A map twice as strong stays so, which its own range would hide."""
    weak = torch.linspace(0, 0.5, 16).view(1, 4, 4)
    scaled = set_wide(torch.cat([weak, 2 * weak]), (0.0, 2.0))
    assert_close(scaled[1], 2 * scaled[0])
    assert_close(set_wide(weak * 9, (0.0, 2.0)).amax(), torch.tensor(1.0))  # clipped
    assert not set_wide(weak, (0.3, 0.3)).any()


def test_tiles_by_hand() -> None:
    expected = torch.tensor([[0, 0, 1], [0, 0, 1], [2, 2, 3]])
    assert tiles(3, 3, 2).equal(expected)
    with pytest.raises(ValueError, match="1 pixel or more, but got 0"):
        tiles(3, 3, 0)


def test_regions_are_scaled_each_by_its_own_range() -> None:
    maps = torch.rand(2, 7, 9)
    regions = tiles(7, 9, 4)
    scaled = region_min_max(maps, regions)
    for k in range(2):
        for region in range(int(regions.max()) + 1):
            inside = regions == region
            values = maps[k][inside]
            expected = (values - values.min()) / (values.max() - values.min())
            assert_close(scaled[k][inside], torch.nan_to_num(expected))
    whole = torch.zeros(2, 7, 9).long()
    assert_close(region_min_max(maps, whole), min_max(maps))


def test_regions_of_each_image_and_constant_ones() -> None:
    maps = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[1.0, 2.0], [5.0, 9.0]]])
    rows, columns = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [0, 1]])
    scaled = region_min_max(maps, torch.stack([rows, columns]))
    assert_close(scaled, torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_follow_an_edge(channels: int) -> None:
    image = torch.zeros(2, channels, 16, 16)
    image[:, :, :, 5:] = 1
    found = superpixels(image, 4)
    assert found.shape == (2, 16, 16)
    assert 2 <= found.amax() + 1 <= 9
    for one in found:
        assert not set(one[:, :5].flatten().tolist()) & set(one[:, 5:].flatten().tolist())
