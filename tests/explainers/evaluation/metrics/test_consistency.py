"""Rank correlation and SSIM of maps against scipy and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from saliencies import KINDS, maps
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from explainers.evaluation.metrics.consistency import map_ssim, spearman
from explainers.evaluation.metrics.scaling import min_max


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "constant"])
def test_spearman_is_scipys(kind: str) -> None:
    one, two = maps(kind, 0)[0], maps(kind, 1)[0]
    for k, value in enumerate(spearman(one, two)):
        expected = spearmanr(one[k].flatten(), two[k].flatten()).statistic
        assert value.item() == pytest.approx(expected)


def test_spearman_of_constant_and_reversed_maps() -> None:
    saliency = torch.rand(1, 6, 6)
    assert spearman(saliency, torch.ones(1, 6, 6)).item() == 0
    assert spearman(saliency, saliency.exp()).item() == pytest.approx(1)
    assert spearman(saliency, -saliency).item() == pytest.approx(-1)


def test_ssim_is_scikit_images_on_scaled_maps() -> None:
    one = torch.rand(2, 20, 24) * 5
    two = one + torch.rand(2, 20, 24)
    for k, value in enumerate(map_ssim(one, two)):
        pair = [min_max(part[k : k + 1])[0].double().numpy() for part in (one, two)]
        expected = structural_similarity(
            *pair, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert value.item() == pytest.approx(expected, abs=1e-4)
    assert np.isclose(map_ssim(one, 7 * one + 3).numpy(), 1).all()  # scale and offset do not count
