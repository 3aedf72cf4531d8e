"""Removal of pixels by hand values and a slow rewrite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torch.testing import assert_close

from explainers.evaluation.metrics.faithfulness import (
    NEIGHBOURS,
    confidence_drop,
    confidence_increased,
    filled,
    insertion_deletion,
    masked,
    road,
)

TARGET = torch.zeros(1).long()


def mean(image: Tensor, target: Tensor) -> Tensor:
    """A classifier whose probability is the mean intensity."""
    return image.mean((1, 2, 3))


def test_drop_and_increase_by_hand() -> None:
    before, after = torch.tensor([0.8, 0.5, 0.4]), torch.tensor([0.2, 0.5, 0.6])
    assert_close(confidence_drop(before, after), torch.tensor([75.0, 0.0, 0.0]))
    assert confidence_increased(before, after).tolist() == [0, 0, 1]
    assert confidence_drop(torch.zeros(1), torch.ones(1)).isnan()


def test_either_part_goes() -> None:
    image = torch.rand(2, 3, 4, 4)
    weight = torch.rand(2, 4, 4)
    relevant, rest = masked(image, weight, "relevant"), masked(image, weight, "rest")
    assert_close(relevant + rest, image)
    assert_close(rest, image * weight[:, None])
    hard = weight > 0.5
    assert not masked(image, hard, "rest")[:, 0][~hard].any()
    assert not masked(image, hard, "relevant")[:, 0][hard].any()


def test_insertion_and_deletion_pixel_by_pixel() -> None:
    image, saliency = torch.rand(1, 1, 12, 12), torch.rand(1, 12, 12)
    found = insertion_deletion(mean, image, TARGET, saliency, step=10)
    black, full = image.clone(), gaussian_blur2d(image, (11, 11), (5.0, 5.0))
    ranking = np.argsort(-saliency.flatten().numpy(), kind="stable")
    deletion, insertion, x = [black.mean().item()], [full.mean().item()], [0.0]
    for start in range(0, 144, 10):
        for pixel in ranking[start : start + 10]:
            y, column = divmod(int(pixel), 12)
            black[0, :, y, column] = 0
            full[0, :, y, column] = image[0, :, y, column]
        deletion.append(black.mean().item())
        insertion.append(full.mean().item())
        x.append(min(start + 10, 144) / 144)
    assert found["deletion"].item() == pytest.approx(np.trapezoid(deletion, x))
    assert found["insertion"].item() == pytest.approx(np.trapezoid(insertion, x))


def test_the_brightest_first_is_best_for_a_mean() -> None:
    image = torch.rand(3, 1, 16, 16)
    target = torch.zeros(3).long()
    right = insertion_deletion(mean, image, target, image[:, 0])
    wrong = insertion_deletion(mean, image, target, -image[:, 0])
    assert (right["deletion"] < wrong["deletion"]).all()


def test_neighbours_sum_to_one() -> None:
    assert sum(weight for *_, weight in NEIGHBOURS) == pytest.approx(1)


def test_filling_is_the_dense_system() -> None:
    image = torch.rand(2, 2, 5, 6)
    removed = torch.rand(2, 5, 6) < 0.6
    found = filled(image, removed)
    for one, gone, result in zip(image, removed, found, strict=True):
        system, right = np.zeros((30, 30)), np.zeros((30, 2))
        for y in range(5):
            for x in range(6):
                k = 6 * y + x
                if not gone[y, x]:
                    system[k, k], right[k] = 1, one[:, y, x]
                    continue
                for down, side, weight in NEIGHBOURS:
                    if 0 <= y + down < 5 and 0 <= x + side < 6:
                        system[k, k] += weight
                        system[k, k + 6 * down + side] -= weight
        expected = np.linalg.solve(system, right).T.reshape(2, 5, 6)
        assert_close(result.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_filling_keeps_a_slope_and_what_is_left() -> None:
    """A linear image is its own interpolation away from the border."""
    image = torch.linspace(0, 1, 9).expand(1, 1, 9, 9)
    removed = torch.zeros(1, 9, 9).bool()
    removed[0, 2:7, 2:7] = True
    assert_close(filled(image, removed), image)
    noisy = filled(image, removed, noise=0.1)
    assert noisy[0, 0][~removed[0]].equal(image[0, 0][~removed[0]])
    assert (noisy - image)[0, 0][removed[0]].std() == pytest.approx(0.1, rel=0.5)
    assert noisy.equal(filled(image, removed, noise=0.1))
    assert not filled(image, torch.ones(1, 9, 9).bool()).any()
    assert filled(image, torch.zeros(1, 9, 9).bool()).equal(image)


def test_road_orders_a_right_and_a_wrong_map() -> None:
    """A bright square that is removed and filled in from around it takes the probability along."""
    image = torch.full((1, 1, 16, 16), 0.1)
    image[:, :, 4:8, 4:8] = 1
    right = road(mean, image, TARGET, image[:, 0], noise=0)
    wrong = road(mean, image, TARGET, -image[:, 0], noise=0)
    assert right["road"] > 0.05
    assert_close(right["road"], (right["lerf"] - right["morf"]) / 2)
    assert wrong["road"] < 0


def test_neighbours_in_the_batch_do_not_matter() -> None:
    image, saliency = torch.rand(3, 1, 12, 12), torch.rand(3, 12, 12)
    target = torch.zeros(3).long()
    for metric in (insertion_deletion, road):
        together = metric(mean, image, target, saliency)
        alone = metric(mean, image[1:2], target[:1], saliency[1:2])
        for name in together:
            assert_close(together[name][1:2], alone[name])
