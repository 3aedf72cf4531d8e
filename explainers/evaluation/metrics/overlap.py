"""Overlap of thresholded maps with a mask, and how much of the map lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn.functional import pad

from explainers.evaluation.metrics.localisation import rank, tie_starts
from explainers.evaluation.metrics.scaling import known

TENTHS = tuple(round(0.1 * k, 1) for k in range(11))


class Overlap(NamedTuple):
    """How two sets of pixels overlap, in [0, 1]; NaN where the mask is empty."""

    jaccard: Tensor
    dice: Tensor


def overlap(kept: Bool[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]) -> Overlap:
    """Jaccard (IoU) and Dice of each image, (b)."""
    shared = (kept & mask).sum((1, 2)).double()
    return _overlap(shared, kept.sum((1, 2)), mask.sum((1, 2)))


def _overlap(shared: Tensor, kept: Tensor, area: Tensor) -> Overlap:
    jaccard, dice = shared / (kept + area - shared), 2 * shared / (kept + area)
    return Overlap(*(score.masked_fill(area == 0, torch.nan) for score in (jaccard, dice)))


def threshold_sweep(
    scaled: Float[Tensor, "b h w"],
    mask: Bool[Tensor, "b h w"],
    thresholds: Sequence[float] = TENTHS,
) -> Overlap:
    """Jaccard and Dice, each (b, t), of ``map >= threshold`` at each threshold.

    Args:
        scaled: In [0, 1]: of `min_max`, `set_wide` or `region_min_max`; at 0 every pixel is kept.
        mask: Of one feature, or the union of all.
        thresholds: In [0, 1].

    Source: "On the overlap between Grad-CAM saliency maps and explainable visual features in skin
    cancer images".
    """
    each = [overlap(scaled >= threshold, mask) for threshold in thresholds]
    return Overlap(*(torch.stack(scores, 1) for scores in zip(*each, strict=True)))


def otsu_thresholds(scaled: Float[Tensor, "b h w"]) -> Float64[Tensor, " b"]:
    """Otsu's threshold of each map (scikit-image, 256 bins): pixels above it are kept.

    A constant map's threshold is its value: nothing is above.
    """
    maps = known(scaled).detach().cpu().double().numpy()
    return torch.from_numpy(np.array([threshold_otsu(one) for one in maps])).to(scaled.device)


def area_matched(saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]) -> Overlap:
    """Jaccard and Dice (b) of as many of the most relevant pixels as the mask has.

    Ties at the threshold stay in, so that a constant map keeps every pixel; NaN ranks lowest.

    Its Dice is the overlap of sanity curves.
    """
    values, hits = rank(saliency, mask)
    count, area = values.shape[1], hits[:, 0]
    least = values.gather(1, (count - area).clamp(max=count - 1)[:, None])
    start = torch.searchsorted(values, least)
    return _overlap(hits.gather(1, start)[:, 0].double(), count - start[:, 0], area)


def soft_coverage(
    scaled: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Mean of the scaled map inside the mask: sum(map * mask) / sum(mask); NaN for an empty one.

    Source: "Attention analysis of convolutional neural networks ... skin ultrasound images".
    """
    return (known(scaled).double() * mask).sum((1, 2)) / mask.sum((1, 2))


def binary_coverage(
    kept: Bool[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> dict[str, Float64[Tensor, " b"]]:
    """Share of the mask that is kept ("covered"), and share of the kept inside it ("inside").

    NaN where the mask is empty; nothing kept has 0 inside.
    """
    shared, area = (kept & mask).sum((1, 2)).double(), mask.sum((1, 2))
    inside = shared / kept.sum((1, 2)).clamp(min=1)
    return {"covered": shared / area, "inside": inside.masked_fill(area == 0, torch.nan)}


def relevance_mass(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Share of the map's sum inside the mask: the energy-based pointing game.

    Negative values and NaN count as 0; a map without any positive value scores as a constant one,
    the mask's share. NaN where the mask is empty.

    Source: Arras et al. 2022; Wang et al. 2020 (Score-CAM).
    """
    positive = known(saliency).double().clamp(min=0)
    positive = positive + (positive.amax((1, 2), keepdim=True) == 0)
    share = (positive * mask).sum((1, 2)) / positive.sum((1, 2))
    return share.masked_fill(~mask.flatten(1).any(1), torch.nan)


def relevance_rank(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Share of the K most relevant pixels inside the mask, K its area; NaN where it is empty.

    Of the pixels tied at the K-th value the share inside counts for those that are needed.

    Source: Arras et al. 2022.
    """
    values, hits = rank(saliency, mask)
    count, area = values.shape[1], hits[:, :1]
    least = values.gather(1, (count - area).clamp(max=count - 1))
    first = torch.searchsorted(values, least)
    after = torch.searchsorted(values, least, right=True)
    above, tied = hits.gather(1, after), hits.gather(1, first) - hits.gather(1, after)
    missing = area - (count - after)
    share = (above + missing * tied / (after - first).double()) / area
    return share[:, 0]


def pixel_auprc(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Trapezoid area under the precision-recall curve of all pixels of each image.

    The line between the points makes it larger than `average_precision` where values tie. NaN
    where the mask is empty.

    Source: Arun et al. 2021; scikit-learn's ``precision_recall_curve`` and ``auc``.
    """
    values, hits = rank(saliency, mask)
    start = tie_starts(values)
    found = hits[:, :-1].gather(1, start).double()
    precision = pad(found / (values.shape[1] - start), (0, 1), value=1.0)
    recall = pad(found / hits[:, :1], (0, 1))
    return -torch.trapezoid(precision, recall, dim=1)
