"""MaxBoxAcc and PxAP against slow loops over thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.testing import assert_close

from explainers.evaluation.metrics.boxes import (
    MaxBoxAccuracy,
    PixelAveragePrecision,
    best_box_ious,
)
from explainers.evaluation.metrics.scaling import min_max

BOXES = [torch.tensor([[1.0, 2.0, 5.0, 6.0]]), torch.tensor([[0.0, 0.0, 3.0, 3.0], [6.0, 6, 9, 9]])]


def iou(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)]
    return shared / (sum(areas) - shared)


@pytest.mark.parametrize("parts", ["largest", "any"])
@pytest.mark.parametrize("step", [0.0, 4.0])
def test_every_threshold_one_after_the_other(parts: str, step: float) -> None:
    saliency = torch.rand(2, 10, 9, generator=torch.Generator().manual_seed(1))
    if step:
        saliency = (saliency * step).round()
    found = best_box_ious(saliency, BOXES, parts, 50)  # type: ignore[arg-type]
    for k, one in enumerate(min_max(saliency).double().numpy()):
        for t in range(50):
            regions = regionprops(label(one > t / 50, connectivity=2))
            if parts == "largest":  # any of those of one size
                most = max((region.area for region in regions), default=0)
                regions = [region for region in regions if region.area == most]
            boxes = [(r.bbox[1], r.bbox[0], r.bbox[3], r.bbox[2]) for r in regions]
            best = [max(iou(a, tuple(b.tolist())) for b in BOXES[k]) for a in boxes] or [0.0]
            allowed = best if parts == "largest" else [max(best)]
            assert min(abs(found[k, t].item() - value) for value in allowed) < 1e-6


def square(box: tuple[int, int, int, int], value: float = 1.0) -> Tensor:
    saliency = torch.zeros(1, 10, 9)
    saliency[0, box[1] : box[3], box[0] : box[2]] = value
    return saliency


def test_accuracy_by_hand() -> None:
    """One box met, one by half; the largest part of the third misses, another meets."""
    two_parts = square((0, 5, 9, 10)) + square((0, 0, 3, 3), 0.5)
    saliency = torch.cat([square((1, 2, 5, 6)), square((1, 2, 5, 4)), two_parts])
    boxes = [BOXES[0], BOXES[0], torch.tensor([[0.0, 0, 3, 3]])]
    version1, version2 = MaxBoxAccuracy("largest", (0.5,), 100), MaxBoxAccuracy(thresholds=100)
    for part in range(3):
        for metric in (version1, version2):
            metric.update(saliency[part : part + 1], boxes[part : part + 1])
    assert_close(version1.compute()["max_box_accuracy"], torch.tensor(2 / 3))
    scores = version2.compute()
    expected = {
        "at_0.3": 1.0,
        "at_0.5": 1.0,
        "at_0.7": 2 / 3,
        "max_box_accuracy": 8 / 9,
        "count": 3.0,
    }
    assert {name: value.item() for name, value in scores.items()} == pytest.approx(expected)


def test_an_image_without_boxes_does_not_count() -> None:
    metric = MaxBoxAccuracy(thresholds=10)
    metric.update(torch.rand(2, 10, 9), [BOXES[0], torch.zeros(0, 4)])
    assert metric.compute()["count"] == 1


def test_a_constant_map_finds_nothing() -> None:
    assert not best_box_ious(torch.ones(1, 10, 9), BOXES[:1], "any", 10).any()


def test_pxap_is_average_precision_of_all_pixels_at_once() -> None:
    """Values at the left ends of the bins: thresholds and values are the same."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randint(0, 9, (4, 8, 8), generator=generator) / 8
    saliency[:, 0, 0], saliency[:, 0, 1] = 0, 1
    mask = torch.rand(4, 8, 8, generator=generator) < 0.2
    mask[3] = False  # not counted
    metric = PixelAveragePrecision(bins=8)
    metric.update(saliency[:2], mask[:2])
    metric.update(saliency[2:], mask[2:])
    expected = average_precision_score(mask[:3].flatten(), saliency[:3].flatten())
    assert metric.compute().item() == pytest.approx(expected)


def test_pxap_of_perfect_constant_and_no_maps() -> None:
    mask = torch.zeros(1, 5, 5).bool()
    mask[0, 1:3, 1:3] = True
    for saliency, expected in ((mask.float(), 1.0), (torch.ones(1, 5, 5), 4 / 25)):
        metric = PixelAveragePrecision()
        metric.update(saliency, mask)
        assert metric.compute().item() == pytest.approx(expected)
    assert np.isnan(PixelAveragePrecision().compute().item())
