"""Maps brought to [0, 1]: by their own range, by that of a set of maps, or region by region."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int64
from skimage.segmentation import slic
from torch import Tensor


def known(saliency: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """The map with NaN replaced by its own lowest known value, 0 where all are NaN."""
    unknown = saliency.isnan()
    low = saliency.masked_fill(unknown, torch.inf).amin((1, 2), keepdim=True)
    return torch.where(unknown, low.where(low.isfinite(), 0.0), saliency)


def min_max(saliency: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Each map scaled to [0, 1] by its own minimum and maximum; a constant map becomes 0."""
    saliency = known(saliency)
    low, high = saliency.aminmax(dim=-1)
    low, high = low.amin(1)[:, None, None], high.amax(1)[:, None, None]
    return torch.where(high > low, (saliency - low) / (high - low), 0.0)


def set_range(maps: Iterable[Float[Tensor, "_ h w"]]) -> tuple[float, float]:
    """1st and 99th percentile of the pixels of a whole set of maps; NaN is left out.

    The z-score by the set's mean and deviation, which the dermoscopy study takes,
    changes neither order nor proportions: the scaled maps are the same with it and without it.

    Raises:
        ValueError: If there is no map.
    """
    values = [part.detach().cpu().double().numpy().ravel() for part in maps]
    if not values:
        raise ValueError("a set-wide range needs at least one map, but there is none.")
    low, high = np.nanpercentile(np.concatenate(values), [1, 99])
    return float(low), float(high)


def set_wide(
    saliency: Float[Tensor, "b h w"], bounds: tuple[float, float]
) -> Float[Tensor, "b h w"]:
    """Maps scaled by a set's `set_range` and clipped to [0, 1]: values of images compare.

    A map of a set without any range becomes 0.
    """
    low, high = bounds
    if not high > low:
        return torch.zeros_like(saliency)
    return ((known(saliency) - low) / (high - low)).clamp(0, 1)


def tiles(height: int, width: int, side: int) -> Int64[Tensor, "h w"]:
    """Number of the square tile that each pixel lies in; the last ones may be smaller.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        side: Of a tile, pixels.

    Raises:
        ValueError: If the side is below 1.
    """
    if side < 1:
        raise ValueError(f"the side of a tile must be 1 pixel or more, but got {side}.")
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    return rows[:, None] * (int(columns[-1]) + 1) + columns


def superpixels(image: Float[Tensor, "b c h w"], count: int = 100) -> Int64[Tensor, "b h w"]:
    """Number of the superpixel (SLIC, scikit-image) that each pixel lies in, 0 to about ``count``.

    Args:
        image: Values in [0, 1]; c is 1 or 3. Grey ones are read as colour, for which the weight of
            closeness against likeness is made.
        count: Superpixels aimed at.
    """
    colour = image.detach().cpu().double().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    found = [slic(one, count, start_label=0) for one in colour]
    return torch.from_numpy(np.stack(found)).long().to(image.device)


def region_min_max(
    saliency: Float[Tensor, "b h w"], regions: Int64[Tensor, "*b h w"]
) -> Float[Tensor, "b h w"]:
    """Each region of each map scaled to [0, 1] by its own minimum and maximum, constant ones 0.

    A threshold of the result is a threshold local to the region.

    Args:
        saliency: Maps.
        regions: Number of each pixel's region, from 0: (h, w), or (b, h, w) for each image.
    """
    flat = known(saliency).flatten(1)
    index = regions.to(flat.device).expand(saliency.shape).flatten(1)
    empty = flat.new_zeros(len(flat), int(index.max()) + 1)
    low, high = (
        empty.scatter_reduce(1, index, flat, kind, include_self=False).gather(1, index)
        for kind in ("amin", "amax")
    )
    return torch.where(high > low, (flat - low) / (high - low), 0.0).view_as(saliency)
