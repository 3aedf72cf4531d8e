"""Overlap scores against hand values, numpy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saliencies import KINDS, maps
from skimage.filters import threshold_otsu
from sklearn.metrics import auc, f1_score, jaccard_score, precision_recall_curve
from torch.testing import assert_close

from explainers.evaluation.metrics.localisation import average_precision, percentile_iou
from explainers.evaluation.metrics.overlap import (
    area_matched,
    binary_coverage,
    otsu_thresholds,
    overlap,
    pixel_auprc,
    relevance_mass,
    relevance_rank,
    soft_coverage,
    threshold_sweep,
)
from explainers.evaluation.metrics.scaling import min_max

EMPTY = torch.zeros(1, 2, 2).bool()
ONE = torch.tensor([[[True, False], [False, False]]])
MAP = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
PER_IMAGE = [
    lambda saliency, mask: area_matched(saliency, mask).jaccard,
    lambda saliency, mask: area_matched(saliency, mask).dice,
    soft_coverage,
    relevance_mass,
    relevance_rank,
    pixel_auprc,
    lambda saliency, mask: binary_coverage(saliency > 2, mask)["covered"],
    lambda saliency, mask: binary_coverage(saliency > 2, mask)["inside"],
    lambda saliency, mask: threshold_sweep(saliency, mask).dice[:, 3],
]


@pytest.mark.parametrize("score", PER_IMAGE)
def test_an_empty_mask_is_nan_and_leaves_its_neighbour_alone(score) -> None:  # noqa: ANN001
    both = score(MAP.repeat(2, 1, 1), torch.cat([EMPTY, ONE]))
    assert both[0].isnan()
    assert both[1] == score(MAP, ONE)[0]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_sweep_is_scikit_learns_jaccard_and_f1(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed)
    scaled = min_max(saliency)
    found = threshold_sweep(scaled, mask, (0.0, 0.3, 1.0))
    for k in range(len(saliency)):
        for t, threshold in enumerate((0.0, 0.3, 1.0)):
            predicted, truth = (scaled[k] >= threshold).flatten(), mask[k].flatten()
            assert found.jaccard[k, t] == pytest.approx(jaccard_score(truth, predicted))
            assert found.dice[k, t] == pytest.approx(f1_score(truth, predicted))


def test_overlap_by_hand() -> None:
    kept = torch.tensor([[[True, True], [False, False]]])
    jaccard, dice = overlap(kept, ONE)
    assert jaccard.item() == 1 / 2
    assert dice.item() == 2 / 3


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_area_matched_keeps_as_many_pixels_as_the_mask(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed)
    found = area_matched(saliency, mask)
    for k in range(len(saliency)):
        least = saliency[k].flatten().sort(descending=True).values[mask[k].sum() - 1]
        kept = saliency[k] >= least
        shared, either = (kept & mask[k]).sum(), (kept | mask[k]).sum()
        assert found.jaccard[k] == pytest.approx((shared / either).item())
        assert found.dice[k] == pytest.approx((2 * shared / (kept.sum() + mask[k].sum())).item())


def test_area_matched_is_the_iou_at_the_percentile_of_the_area() -> None:
    saliency = torch.rand(2, 10, 10)
    mask = torch.rand(100).argsort().view(1, 10, 10).expand(2, 10, 10) < 20
    assert_close(area_matched(saliency, mask).jaccard, percentile_iou(saliency, mask, 80.0))


def test_area_matched_of_whole_and_single_pixel_masks() -> None:
    assert area_matched(MAP, torch.ones(1, 2, 2).bool()).jaccard.item() == 1
    assert area_matched(MAP, ONE).jaccard.item() == 1
    constant = torch.full((1, 2, 2), 3.0)
    assert area_matched(constant, ONE).jaccard.item() == 1 / 4


def test_otsu_is_scikit_images_for_each_map() -> None:
    scaled = min_max(torch.rand(3, 12, 12) ** 3)
    expected = [threshold_otsu(one.double().numpy()) for one in scaled]
    assert_close(otsu_thresholds(scaled), torch.tensor(expected).double())
    constant = torch.full((1, 4, 4), 0.5)
    assert not (constant > otsu_thresholds(constant)[:, None, None]).any()


def test_coverage_by_hand() -> None:
    mask = torch.tensor([[[True, True], [False, False]]])
    assert soft_coverage(MAP / 4, mask).item() == (1 + 0.75) / 2
    kept = torch.tensor([[[True, False], [True, True]]])
    assert binary_coverage(kept, mask)["covered"].item() == 1 / 2
    assert binary_coverage(kept, mask)["inside"].item() == pytest.approx(1 / 3)
    assert binary_coverage(torch.zeros(1, 2, 2).bool(), mask)["inside"].item() == 0


def test_relevance_mass_by_hand() -> None:
    assert relevance_mass(MAP, ONE).item() == 4 / 10
    assert relevance_mass(MAP - 2, ONE).item() == 2 / 3  # the negative value counts as 0
    assert relevance_mass(torch.zeros(1, 2, 2), ONE).item() == 1 / 4
    with_nan = torch.tensor([[[4.0, math.nan], [2.0, 1.0]]])
    assert relevance_mass(with_nan, ONE).item() == 4 / 8  # NaN is the lowest known value, 1


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_relevance_rank_is_the_mean_over_orders_of_ties(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed, side=4)
    found = relevance_rank(saliency, mask)
    generator = np.random.default_rng(seed)
    for k in range(len(saliency)):
        values, truth = saliency[k].flatten().numpy(), mask[k].flatten().numpy()
        shares = []
        for _ in range(400):
            chosen = np.lexsort([generator.random(len(values)), -values])[: truth.sum()]
            shares.append(truth[chosen].mean())
        error = max(1e-9, 5 * np.std(shares) / 20)
        assert found[k].item() == pytest.approx(np.mean(shares), abs=error)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_auprc_is_scikit_learns(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed)
    found = pixel_auprc(saliency, mask)
    for k in range(len(saliency)):
        precision, recall, _ = precision_recall_curve(mask[k].flatten(), saliency[k].flatten())
        assert found[k].item() == pytest.approx(auc(recall, precision))


def test_auprc_is_not_average_precision() -> None:
    constant = torch.ones(1, 2, 2)
    assert average_precision(constant, ONE).item() == 1 / 4
    assert pixel_auprc(constant, ONE).item() == (1 + 1 / 4) / 2
