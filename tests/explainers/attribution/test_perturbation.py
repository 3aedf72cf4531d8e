from __future__ import annotations

import pytest
import torch
from networks import images, small
from torch import Tensor
from torch.testing import assert_close

from classifiers.network import probabilities
from explainers.attribution.perturbation import RISE, Occlusion, smooth_masks
from explainers.attribution.scores import ClassScores

TARGET = torch.tensor([2, 0, 1])


def test_occlusion_is_the_slow_loop() -> None:
    network, image = small(3), images(channels=3)
    scores, expected = ClassScores(network), []
    for one, k in zip(image, TARGET.tolist(), strict=True):
        loss, count = torch.zeros(10, 12), torch.zeros(10, 12)
        tops, lefts = [0, 2, 4, 6, 8], [0, 3, 6, 9]  # the last ones are cut off by the border
        for top in tops:
            for left in lefts:
                covered = one.clone()
                covered[:, top : top + 3, left : left + 4] = 0
                lost = scores(one[None])[0, k] - scores(covered[None])[0, k]
                loss[top : top + 3, left : left + 4] += lost
                count[top : top + 3, left : left + 4] += 1
        expected.append((loss / count).abs())
    found = Occlusion(network, window=0.3, stride=0.25, work_batch=5).explain(image, TARGET)
    assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-4)


def slow_mask(grid: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """A grid upsampled by hand: bilinear between the centres of its cells, the edge repeated."""
    cells = len(grid)
    tall, wide = -(-height // cells), -(-width // cells)
    mask = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            down = (y + int(shift[0] * tall) + 0.5) * cells / ((cells + 1) * tall) - 0.5
            right = (x + int(shift[1] * wide) + 0.5) * cells / ((cells + 1) * wide) - 0.5
            for row in range(cells):
                for column in range(cells):
                    near = 1 - abs(min(max(down, 0), cells - 1) - row)
                    beside = 1 - abs(min(max(right, 0), cells - 1) - column)
                    mask[y, x] += max(near, 0) * max(beside, 0) * grid[row, column]
    return mask


def test_rise_is_the_slow_loop() -> None:
    network, image, seed = small(3), images(), 4
    generator = torch.Generator().manual_seed(seed)
    grids = (torch.rand(6, 3, 3, generator=generator) < 0.4).float()
    shifts = torch.rand(6, 2, generator=generator)
    total = torch.zeros(3, 10, 12)
    for grid, shift in zip(grids, shifts, strict=True):
        mask = slow_mask(grid, shift, 10, 12)
        for k, one in enumerate(image):
            total[k] += probabilities(network((one * mask)[None]))[0, TARGET[k]] * mask
    explainer = RISE(network, masks=6, cells=3, probability=0.4, seed=seed, work_batch=7)
    assert_close(explainer.explain(image, TARGET), total / (6 * 0.4), atol=1e-6, rtol=1e-4)


def test_rises_masks_keep_their_share_of_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    grids = (torch.rand(3000, 7, 7, generator=generator) < 0.3).float()
    masks = smooth_masks(grids, torch.rand(3000, 2, generator=generator), 40, 30)
    assert masks.shape == (3000, 40, 30)
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6
    assert_close(masks.mean(0), torch.full((40, 30), 0.3), atol=0.04, rtol=0)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"window is a share of the image side .* but got 0\."):
        Occlusion(small(), window=0.0)
    with pytest.raises(ValueError, match=r"stride is a share of the image side .* but got 1\.5"):
        Occlusion(small(), stride=1.5)
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\), but got 1\.0"):
        RISE(small(), probability=1.0)
    with pytest.raises(ValueError, match="masks must be 1 or more, but got 0"):
        RISE(small(), masks=0)
