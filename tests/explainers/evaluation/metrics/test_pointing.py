"""The peak of a map, by hand and against a slow search."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from explainers.evaluation.metrics.pointing import (
    graded_hit,
    grow,
    hit_rate,
    peaks,
    pointing_game,
)


def at(*pixels: tuple[int, int], side: int = 9) -> torch.Tensor:
    image = torch.zeros(1, side, side)
    for y, x in pixels:
        image[0, y, x] = 1
    return image


def test_tied_peaks_and_unknown_values() -> None:
    saliency = torch.tensor([[[1.0, 3.0], [3.0, math.nan]]])
    assert peaks(saliency).tolist() == [[[False, True], [True, False]]]
    assert peaks(torch.full((1, 2, 2), math.nan)).all()


@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5, 3.2])
def test_grown_mask_is_every_pixel_in_reach(radius: float) -> None:
    mask = torch.rand(2, 9, 12) < 0.05
    mask[:, 4, 4] = True
    y, x = torch.meshgrid(torch.arange(9), torch.arange(12), indexing="ij")
    for one, grown in zip(mask, grow(mask, radius), strict=True):
        distance = torch.stack([((y - v) ** 2 + (x - u) ** 2) for v, u in one.nonzero()]).amin(0)
        assert grown.equal(distance <= radius**2)


def test_pointing_game_by_hand() -> None:
    mask = at((4, 4)).bool()
    assert pointing_game(at((4, 4)), mask, 0).item() == 1
    assert pointing_game(at((4, 6)), mask, 0).item() == 0
    assert pointing_game(at((4, 6)), mask, 2 / 9).item() == 1  # two pixels of nine
    assert pointing_game(at((5, 6)), mask, 2 / 9).item() == 0  # a circle, not a square
    assert pointing_game(at((4, 4), (0, 0)), mask, 0).item() == 1 / 2
    assert pointing_game(torch.ones(1, 9, 9), mask, 0).item() == pytest.approx(1 / 81)
    assert pointing_game(at((4, 4)), torch.zeros(1, 9, 9).bool()).isnan()


def test_the_default_tolerance_is_15_pixels_at_224() -> None:
    mask = at((100, 100), side=224).bool()
    assert pointing_game(at((100, 115), side=224), mask).item() == 1
    assert pointing_game(at((100, 116), side=224), mask).item() == 0


def test_hit_rate_looks_at_the_original_image() -> None:
    """A peak pixel of the map covers four of the original, of which the mask has two."""
    mask = torch.zeros(2, 18, 18).bool()
    mask[0, 8:10, 8:10] = True
    mask[1, 0:2, 0:2] = True
    assert hit_rate(at((4, 4)).repeat(2, 1, 1), mask).tolist() == [1, 0]


def test_graded_hit_is_the_level_under_the_peak() -> None:
    importance = torch.tensor([[[3, -1], [0, 1]]])
    saliency = torch.tensor([[[0.0, 9.0], [0.0, 0.0]]])
    assert graded_hit(saliency, importance).item() == -1
    assert_close(graded_hit(torch.zeros(1, 2, 2), importance), torch.tensor([0.75]).double())
