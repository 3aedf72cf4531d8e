"""The terms of the similar-adversarial objective (L_S, L_C, L_G, L_R), one function each."""

from __future__ import annotations

from collections.abc import Iterable
from math import log

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def distance(first: Float[Tensor, "*n"], second: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Distance d of Eq. 6: mean absolute plus mean squared difference over all values."""
    return F.l1_loss(first, second) + F.mse_loss(first, second)


def decision_loss(
    logits: Float[Tensor, "b 1"],
    decision: Int64[Tensor, " b"],
    threshold: float = 0.5,
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy between the classifier's score and a hard decision (a term of Eq. 7).

    The score s is mapped piecewise linearly so that ``threshold`` t becomes 0.5: 0.5 s / t below,
    1 - 0.5 (1 - s) / (1 - t) above. Computed from the logit, stable where s saturates.

    Args:
        logits: Of the generated image.
        decision: Wanted class, 0 or 1.
        threshold: Operating point of the classifier, inside (0, 1).
        weight: Of each image; 1 by default.
    """
    logit = logits[:, 0]
    score, above = logit.sigmoid(), logit.sigmoid() >= threshold
    # each branch is computed on values that keep its logarithm finite, for finite gradients
    low, high = score.where(~above, score.new_zeros(())), score.where(above, score.new_ones(()))
    log_one = torch.where(
        above,
        torch.log1p(-0.5 * (1 - high) / (1 - threshold)),
        F.logsigmoid(logit) + log(0.5 / threshold),
    )
    log_zero = torch.where(
        above,
        F.logsigmoid(-logit) + log(0.5 / (1 - threshold)),
        torch.log1p(-0.5 * low / threshold),
    )
    return _mean(-torch.where(decision.bool(), log_one, log_zero), weight)


def margin_similar(
    logits: Float[Tensor, "b k"],
    decision: Int64[Tensor, " b"],
    margin: float,
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 10 for the similar image: max(max_{i != k} Z_i - Z_k, -m), weighted mean of the batch."""
    return _mean(_gap(logits, decision).clamp(min=-margin), weight)


def margin_adversarial(
    logits: Float[Tensor, "b k"],
    decision: Int64[Tensor, " b"],
    margin: float,
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 10 for the adversarial image: max(Z_k - max_{i != k} Z_i, -m), weighted mean."""
    return _mean((-_gap(logits, decision)).clamp(min=-margin), weight)


def _mean(loss: Float[Tensor, " b"], weight: Float[Tensor, " b"] | None) -> Float[Tensor, ""]:
    return (loss if weight is None else weight * loss).mean()


def _gap(logits: Float[Tensor, "b k"], decision: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Largest logit of another class minus that of the decided one."""
    decided = F.one_hot(decision, logits.shape[1]).bool()
    others = logits.masked_fill(decided, -torch.inf).amax(1)
    return others - logits.gather(1, decision[:, None])[:, 0]


def weight_proximity(first: Iterable[Tensor], second: Iterable[Tensor]) -> Float[Tensor, ""]:
    """L_G (Eq. 8) without its weight: 2-norm, not squared, of all paired weights as one vector.

    The gradient is 0, not NaN, where the two are equal.
    """
    differences = [(a - b).flatten() for a, b in zip(first, second, strict=True)]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(differences))
    return norm


def total_variation(image: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """L_R (Eq. 9) without its weight: mean absolute difference along each axis, the two added."""
    vertical = (image[:, :, 1:] - image[:, :, :-1]).abs().mean()
    horizontal = (image[:, :, :, 1:] - image[:, :, :, :-1]).abs().mean()
    return vertical + horizontal


def squared_variation(mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Mean squared difference along each axis, the two added (the TV of arXiv:1705.07857)."""
    return mask.diff(dim=2).square().mean() + mask.diff(dim=3).square().mean()
