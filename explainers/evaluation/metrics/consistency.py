"""How alike two maps of the same image are."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from scipy.stats import rankdata
from torch import Tensor

from explainers.evaluation.metrics.generated import image_similarity
from explainers.evaluation.metrics.scaling import known, min_max


def spearman(
    first: Float[Tensor, "b h w"], second: Float[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Spearman's rank correlation of the pixels of each pair of maps, ties at their mean rank.

    0 where one of the two is constant: such a map says nothing about the other. NaN ranks lowest.

    Source: Arun et al. 2021.
    """
    one, two = (centred_ranks(known(part)) for part in (first, second))
    length = one.norm(dim=1) * two.norm(dim=1)
    return torch.where(length > 0, (one * two).sum(1) / length, 0.0)


def centred_ranks(saliency: Float[Tensor, "b h w"]) -> Float64[Tensor, "b n"]:
    """Rank of each pixel in its map minus the mean rank."""
    flat = saliency.detach().flatten(1).cpu().numpy()
    ranks = torch.from_numpy(rankdata(flat, axis=1) - (flat.shape[1] + 1) / 2)
    return ranks.to(saliency.device)


def map_ssim(
    first: Float[Tensor, "b h w"], second: Float[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """SSIM of each pair of maps, each scaled to [0, 1] by its own range; at least 11 px a side.

    Source: Adebayo et al. 2018; window and borders as in `image_similarity`.
    """
    pair = [min_max(part)[:, None] for part in (first, second)]
    return image_similarity(pair[0], pair[1])[0].double()
