"""Scores of generated images against scikit-image and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.testing import assert_close

from explainers.evaluation.metrics.generated import (
    Decisions,
    ImageSimilarity,
    decision_auc,
    flipped,
    image_similarity,
    kept,
)


def test_kept_and_flipped_by_hand() -> None:
    decision, other = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 0])
    assert kept(decision, other).tolist() == [True, False, True, False]
    assert flipped(decision, other).tolist() == [False, True, False, True]


def test_decisions_by_hand() -> None:
    """Classes 0, 0, 0, 1 and never 2; two of three zeros kept, one flipped; the one lost."""
    metric = Decisions(3)
    decision = torch.tensor([0, 0, 0, 1])
    similar, adversarial = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 2, 1])
    probability = torch.full((4, 3), 1 / 3)
    for half in (slice(0, 2), slice(2, 4)):
        metric.update(
            decision[half],
            probability[half],
            probability[half],
            similar[half],
            adversarial[half],
        )
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert scores == pytest.approx(
        {
            "kept": 2 / 4,
            "kept_class0": 2 / 3,
            "kept_class1": 0,
            "kept_class2": float("nan"),
            "flipped": 1 / 4,
            "flipped_class0": 1 / 3,
            "flipped_class1": 0,
            "flipped_class2": float("nan"),
            "auc_similar": 0.5,
            "auc_adversarial": 0.5,
        },
        nan_ok=True,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_decision_auc_equals_scikit_learn(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.randn(30, classes, generator=generator).mul(2).round().softmax(1)
    decision = torch.randint(0, classes - (classes > 2), (30,), generator=generator)
    decision[:2] = torch.tensor([0, 1])
    each = [roc_auc_score(decision == k, probability[:, k].numpy()) for k in set(decision.tolist())]
    theirs = each[1] if classes == 2 else sum(each) / len(each)
    assert decision_auc(probability, decision).item() == pytest.approx(theirs, abs=1e-5)


def test_auc_is_nan_where_all_decisions_agree() -> None:
    probability = torch.rand(5, 2)
    assert decision_auc(probability, torch.ones(5, dtype=torch.long)).isnan()


def auc_adversarial(score: Tensor, decision: Tensor) -> float:
    metric = Decisions(2)
    probability = torch.stack([1 - score, score], 1)
    metric.update(decision, probability, probability, decision, decision)
    return metric.compute()["auc_adversarial"].item()


def test_adversarial_auc_is_that_of_the_opposite() -> None:
    decision = torch.tensor([0, 0, 1, 1, 1])
    score = torch.tensor([0.9, 0.4, 0.1, 0.5, 0.4])
    theirs = roc_auc_score(decision, 1 - score.numpy())
    assert auc_adversarial(score, decision) == pytest.approx(theirs)


def test_adversarial_auc_tells_tiny_probabilities_apart() -> None:
    """In float32 1 - 1e-9 and 1 - 1e-10 are the same number."""
    assert auc_adversarial(torch.tensor([1e-9, 1e-10]), torch.tensor([0, 1])) == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.floats(0.001, 0.5))
def test_similarity_equals_scikit_image(seed: int, channels: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(2, channels, 24, 31, generator=generator)
    second = (first + noise * torch.randn(first.shape, generator=generator)).clamp(0, 1)
    ssim, psnr = image_similarity(first, second)
    for k in range(2):
        pair = first[k].double().numpy(), second[k].double().numpy()
        theirs = structural_similarity(
            *pair,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        assert ssim[k].item() == pytest.approx(theirs, abs=1e-5)
        expected = peak_signal_noise_ratio(*pair, data_range=1)
        assert psnr[k].item() == pytest.approx(expected, abs=1e-3)


def test_similarity_of_a_region_is_scikit_images_map_averaged_there() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 1, 24, 31, generator=generator)
    region = torch.rand(1, 24, 31, generator=generator) < 0.3
    ssim, psnr = image_similarity(first, second, region)
    pair, inside = (first[0, 0].numpy(), second[0, 0].numpy()), region[0].numpy()
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    full = structural_similarity(*pair, **how, data_range=1, full=True)[1][5:-5, 5:-5]
    assert ssim.item() == pytest.approx(full[inside[5:-5, 5:-5]].mean(), abs=1e-5)
    expected = peak_signal_noise_ratio(pair[0][inside], pair[1][inside], data_range=1)
    assert psnr.item() == pytest.approx(expected, abs=1e-3)
    assert image_similarity(first, second, region & False)[0].isnan().all()


def test_identical_images() -> None:
    image = torch.rand(1, 1, 16, 16)
    ssim, psnr = image_similarity(image, image)
    assert_close(ssim, torch.ones(1))
    assert psnr.isposinf().all()


def test_metric_leaves_identical_pairs_out_of_psnr() -> None:
    """A shift by 0.1 everywhere is 20 dB."""
    image = 0.5 * torch.rand(3, 1, 16, 16)
    other = image + torch.tensor([0.1, 0.0, 0.1])[:, None, None, None]
    metric = ImageSimilarity()
    metric.update(image[:2], other[:2])
    metric.update(image[2:], other[2:])
    scores = metric.compute()
    assert scores["psnr"].item() == pytest.approx(20, abs=1e-3)
    assert scores["identical"] == 1
    assert scores["ssim"].item() == pytest.approx(image_similarity(image, other)[0].mean().item())


def test_sixteen_bit_images_are_compared_in_32_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 1, 32, 32, generator=generator).bfloat16()
    second = (first.float() * 0.9).bfloat16()
    expected = image_similarity(first.float(), second.float())
    for found, value in zip(image_similarity(first, second), expected, strict=True):
        assert_close(found, value, rtol=0, atol=0)
