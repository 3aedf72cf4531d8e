"""Where the peak of a map lies."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from explainers.evaluation.metrics.scaling import known

TOLERANCE = 15 / 224  # 15 px at 224 px


def peaks(saliency: Float[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """The pixels that share the highest value of each map; NaN ranks lowest."""
    saliency = known(saliency)
    return saliency == saliency.amax((1, 2), keepdim=True)


def pointing_game(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"], tolerance: float = TOLERANCE
) -> Float64[Tensor, " b"]:
    """1 where the peak is in the mask or near it, 0 elsewhere; NaN where the mask is empty.

    Of tied peaks the share that hits counts: a constant map scores the grown mask's share.

    Args:
        saliency: Maps.
        mask: True inside the evidence.
        tolerance: Largest distance from the mask, share of the image's longer side; 0 for none.

    Source: Zhang et al. 2018: 15 px at 224 px.
    """
    grown = grow(mask, tolerance * max(mask.shape[1:]))
    peak = peaks(saliency)
    share = (peak & grown).sum((1, 2)) / peak.sum((1, 2)).double()
    return share.masked_fill(~mask.flatten(1).any(1), torch.nan)


def grow(mask: Bool[Tensor, "b h w"], radius: float) -> Bool[Tensor, "b h w"]:
    """Every pixel whose centre lies at most ``radius`` pixels from one of the mask's."""
    reach = int(radius)
    offset = torch.arange(-reach, reach + 1, device=mask.device)
    disk = (offset[:, None] ** 2 + offset**2 <= radius**2).float()
    return conv2d(mask[:, None].float(), disk[None, None], padding=reach)[:, 0] > 0.5


def hit_rate(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b height width"]
) -> Float64[Tensor, " b"]:
    """1 where the peak of the map, resized to the original image, lies in its mask; else 0.

    Tied peaks and empty masks as in `pointing_game`.

    Source: CheXlocalize (Saporta et al. 2022); bilinear. Its interval is that of
    `statistics.bootstrap_interval` with 1000 samples.
    """
    return pointing_game(resized(saliency, (mask.shape[1], mask.shape[2])), mask, 0.0)


def resized(saliency: Float[Tensor, "b h w"], size: tuple[int, int]) -> Float[Tensor, "b h2 w2"]:
    """Maps resized bilinearly to the original image's height and width."""
    return interpolate(known(saliency)[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def graded_hit(
    saliency: Float[Tensor, "b h w"], importance: Int[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Importance level of the region under the peak of each map, the mean over tied peaks.

    Args:
        saliency: Maps.
        importance: Level of each pixel's region, 3 the most relevant .. -1 the least.

    Source: "Attention analysis of convolutional neural networks ... skin ultrasound images".
    """
    peak = peaks(saliency)
    return (importance * peak).sum((1, 2)) / peak.sum((1, 2)).double()
