from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.losses import total_variation as summed_variation
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from classifiers.network import paired_logits
from explainers.learned.losses import (
    decision_loss,
    distance,
    margin_adversarial,
    margin_similar,
    total_variation,
    weight_proximity,
)

THRESHOLDS = [0.5, 0.3, 0.9]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_by_hand() -> None:  # differences 0.5 and 1: means 0.75 and (0.25 + 1) / 2
    image, other = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.5, 0.0]]]])
    assert_close(distance(image, other), torch.tensor(0.75 + 0.625))


def test_distance_is_a_mean_over_everything() -> None:
    first, second = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    total = 0.0
    for a, b in zip(first.numpy().ravel(), second.numpy().ravel(), strict=True):
        total += abs(a - b) + (a - b) ** 2
    assert float(distance(first, second)) == pytest.approx(total / 120)


def slow_decision_loss(logits: list[float], wanted: list[int], threshold: float) -> float:
    total = 0.0
    for logit, y in zip(logits, wanted, strict=True):
        score = 1 / (1 + np.exp(-logit))
        mapped = np.interp(score, [0, threshold, 1], [0, 0.5, 1])
        total -= np.log(mapped if y else 1 - mapped)
    return total / len(logits)


@pytest.mark.parametrize(
    ("score", "wanted", "threshold", "mapped"),
    [
        (0.3, 1, 0.3, 0.5),
        (0.15, 1, 0.3, 0.25),
        (0.65, 1, 0.3, 0.75),
        (0.45, 0, 0.9, 0.75),
        (0.95, 0, 0.9, 0.25),
    ],
)
def test_decision_loss_by_hand(score: float, wanted: int, threshold: float, mapped: float) -> None:
    logit = torch.tensor([[score]], dtype=torch.float64).logit()
    loss = decision_loss(logit, torch.tensor([wanted]), threshold)
    assert float(loss) == pytest.approx(-log(mapped), rel=1e-6)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@given(logits=st.lists(st.floats(-15, 15), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_decision_loss_like_numpy(threshold: float, logits: list[float], seed: int) -> None:
    wanted = np.random.default_rng(seed).integers(0, 2, len(logits)).tolist()
    score = torch.tensor(logits, dtype=torch.float64)[:, None]
    loss = decision_loss(score, torch.tensor(wanted), threshold)
    expected = slow_decision_loss(logits, wanted, threshold)
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_decision_loss_at_one_half_is_binary_cross_entropy() -> None:
    logits, wanted = 5 * drawn(50, 1), torch.arange(50) % 2
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], wanted.double())
    assert_close(decision_loss(logits, wanted), expected)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("logit", "wanted"), [(100.0, 0), (100.0, 1), (-100.0, 0), (-100.0, 1)])
def test_decision_loss_of_a_saturated_score(logit: float, wanted: int, threshold: float) -> None:
    logits = torch.tensor([[logit]], requires_grad=True)
    loss = decision_loss(logits, torch.tensor([wanted]), threshold)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    if (logit > 0) == bool(wanted):
        assert_close(loss, torch.tensor(0.0))
        assert_close(logits.grad, torch.zeros(1, 1))
    else:  # linear in the logit, and still pulling with full strength
        share = 1 - threshold if logit > 0 else threshold
        assert loss.item() == pytest.approx(100 - log(0.5 / share), rel=1e-5)
        assert_close(logits.grad, torch.tensor([[1.0 if logit > 0 else -1.0]]))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_decision_loss_gradient_by_finite_differences(threshold: float) -> None:
    logits = (3 * drawn(8, 1)).requires_grad_(True)
    wanted = torch.arange(8) % 2
    assert torch.autograd.gradcheck(lambda z: decision_loss(z, wanted, threshold), (logits,))


def test_margins_by_hand() -> None:
    logits = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0]])
    decision = torch.tensor([1, 0])  # the gaps to the best other class are -3 and +3
    assert_close(margin_similar(logits, decision, 1.0), torch.tensor((-1.0 + 3.0) / 2))
    assert_close(margin_adversarial(logits, decision, 1.0), torch.tensor((3.0 - 1.0) / 2))
    assert_close(margin_adversarial(logits, decision, 4.0), torch.tensor((3.0 - 3.0) / 2))


@given(seed=st.integers(0, 999), margin=st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=20, deadline=None)
def test_margins_like_a_plain_loop(seed: int, margin: float) -> None:
    logits = 3 * drawn(7, 4, seed=seed)
    decision = torch.randint(4, (7,), generator=torch.Generator().manual_seed(seed))
    similar, adversarial = [], []
    for z, k in zip(logits.tolist(), decision.tolist(), strict=True):
        others = max(value for i, value in enumerate(z) if i != k)
        similar.append(max(others - z[k], -margin))
        adversarial.append(max(z[k] - others, -margin))
    assert float(margin_similar(logits, decision, margin)) == pytest.approx(np.mean(similar))
    found = float(margin_adversarial(logits, decision, margin))
    assert found == pytest.approx(np.mean(adversarial))


def test_margins_of_one_logit_as_the_pair_of_zero_and_z() -> None:
    pair = paired_logits(torch.tensor([[0.4], [-0.7]]))
    assert_close(pair, torch.tensor([[0.0, 0.4], [0.0, -0.7]]))
    decision = torch.tensor([1, 0])
    assert_close(margin_similar(pair, decision, 0.5), torch.tensor((-0.4 - 0.5) / 2))
    assert_close(margin_adversarial(pair, decision, 0.5), torch.tensor((0.4 + 0.7) / 2))


def test_weight_proximity_is_the_norm_of_one_long_vector() -> None:
    first = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0, 1.0])]
    second = [torch.tensor([[0.0, 0.0]]), torch.tensor([0.0, 1.0])]
    assert_close(weight_proximity(first, second), torch.tensor(5.0))
    drawn_pair = [drawn(3, 4), drawn(5)], [drawn(3, 4, seed=1), drawn(5, seed=2)]
    squares = [((a - b).numpy() ** 2).sum() for a, b in zip(*drawn_pair, strict=True)]
    assert float(weight_proximity(*drawn_pair)) == pytest.approx(sqrt(sum(squares)))


def test_weight_proximity_has_a_zero_gradient_where_equal() -> None:
    first, second = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    torch.autograd.backward(weight_proximity([first], [second]))
    assert_close(first.grad, torch.zeros(4))
    assert_close(second.grad, torch.zeros(4))


def test_weight_proximity_refuses_weights_without_a_partner() -> None:
    with pytest.raises(ValueError, match="zip"):
        weight_proximity([torch.ones(2), torch.ones(2)], [torch.ones(2)])


def test_total_variation_by_hand() -> None:  # vertical |2|, |3|: 2.5; horizontal |1|, |2|: 1.5
    assert_close(total_variation(torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])), torch.tensor(4.0))


def test_total_variation_is_kornias_sum_over_counts() -> None:
    image = drawn(2, 3, 5, 7)
    vertical = summed_variation(image.transpose(2, 3).reshape(-1, 1, 5)).sum()
    horizontal = summed_variation(image.reshape(-1, 1, 7)).sum()
    assert_close(vertical + horizontal, summed_variation(image).sum())
    counts = 2 * 3 * 4 * 7, 2 * 3 * 5 * 6
    assert_close(total_variation(image), vertical / counts[0] + horizontal / counts[1])
