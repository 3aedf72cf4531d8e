"""What the classifier says of an image whose relevant part is removed, or alone kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from kornia.filters import gaussian_blur2d
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from explainers.evaluation.metrics.scaling import known

Probability = Callable[[Tensor, Tensor], Tensor]
NEIGHBOURS = [  # row and column offset, weight: the direct ones twice that of the diagonal ones
    (0, 1, 1 / 6), (0, -1, 1 / 6), (1, 0, 1 / 6), (-1, 0, 1 / 6),
    (1, 1, 1 / 12), (1, -1, 1 / 12), (-1, 1, 1 / 12), (-1, -1, 1 / 12),
]  # fmt: skip
DECILES = tuple(range(10, 100, 10))


def masked(
    image: Float[Tensor, "b c h w"], weight: Tensor, part: Literal["relevant", "rest"]
) -> Float[Tensor, "b c h w"]:
    """The image with one part darkened: times the weight ("rest" goes), or 1 minus it.

    Args:
        image: Values in [0, 1].
        weight: Map scaled to [0, 1] (soft), or the thresholded map (hard), (b, h, w).
        part: What is removed.

    Source: the study of skin ultrasound images (`soft_coverage`): the drop is that without
    the relevant part, the increase that without the rest.
    """
    kept = weight.to(image.dtype)[:, None]
    return image * (kept if part == "rest" else 1 - kept)


def confidence_drop(before: Float[Tensor, " b"], after: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """max(0, Y - O) / Y in percent: its mean is the average drop; NaN where Y is 0.

    Args:
        before: Y, probability of the decided class on the image (1 - p for a negative decision of
            a one-logit network).
        after: O, the same on the masked image.

    Source: Chattopadhay et al. 2018 (Grad-CAM++).
    """
    return 100 * (before - after).clamp(min=0) / before


def confidence_increased(
    before: Float[Tensor, " b"], after: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """1 where the masked image has a higher probability, else 0: its mean is the increase."""
    return (after > before).to(before.dtype)


def order(saliency: Float[Tensor, "b h w"]) -> Int64[Tensor, "b n"]:
    """Pixels of each map from the most to the least relevant, equal ones as they are read."""
    return known(saliency).flatten(1).argsort(dim=1, descending=True, stable=True)


def insertion_deletion(
    probability: Probability,
    image: Float[Tensor, "b c h w"],
    target: Int64[Tensor, " b"],
    saliency: Float[Tensor, "b h w"],
    step: int | None = None,
) -> dict[str, Float64[Tensor, " b"]]:
    """Area under the probability while pixels are removed, or inserted, most relevant first.

    Args:
        probability: Of the target class (b) of images (b, c, h, w).
        image: Values in [0, 1].
        target: Class of each image whose probability is followed.
        saliency: Maps.
        step: Pixels changed at a time, all channels together; the image's width by default, which
            is 224 at 224 px.

    Returns:
        "insertion", from the blurred image (11 px, sigma 5) to the image: the higher the better;
        "deletion", from the image to black: the lower the better. Trapezoid rule, over [0, 1].

    Source: Petsiuk et al. 2018 (RISE).
    """
    blurred = gaussian_blur2d(image, (11, 11), (5.0, 5.0))
    rank = order(saliency).argsort(1).view_as(saliency)  # 0 is the most relevant pixel
    step = step or image.shape[-1]
    counts = [*range(0, rank[0].numel(), step), rank[0].numel()]
    curves: dict[str, list[Tensor]] = {"insertion": [], "deletion": []}
    for count in counts:
        changed = (rank < count)[:, None]
        shown = {
            "insertion": torch.where(changed, image, blurred),
            "deletion": image * ~changed,
        }
        for name, part in shown.items():
            curves[name].append(probability(part, target).double())
    share = torch.tensor(counts, dtype=torch.float64, device=image.device) / counts[-1]
    return {name: torch.trapezoid(torch.stack(c, 1), share) for name, c in curves.items()}


def road(
    probability: Probability,
    image: Float[Tensor, "b c h w"],
    target: Int64[Tensor, " b"],
    saliency: Float[Tensor, "b h w"],
    percentiles: Sequence[float] = DECILES,
    noise: float = 0.01,
    seed: int = 0,
) -> dict[str, Float64[Tensor, " b"]]:
    """Mean probability after the most, or the least, relevant pixels were filled in.

    Args:
        probability: Of the target class (b) of images (b, c, h, w).
        image: Values in [0, 1].
        target: Class of each image whose probability is followed.
        saliency: Maps.
        percentiles: Percent of the pixels that are removed, one after the other.
        noise: Standard deviation of what is added to filled pixels.
        seed: Of the noise, the same for every image.

    Returns:
        "morf" (most relevant first: the lower the better), "lerf" (least relevant first: the
        higher the better) and "road", half their difference.

    Source: Rong et al. 2022; the halved difference as in grad-cam's ROADCombined.
    """
    pixels = image[0, 0].numel()
    rank = order(saliency).argsort(1).view_as(saliency)
    means: dict[str, Tensor] = {}
    for name, position in (("morf", rank), ("lerf", pixels - 1 - rank)):
        each = []
        for percentile in percentiles:
            removed = position < round(pixels * percentile / 100)
            each.append(probability(filled(image, removed, noise, seed), target).double())
        means[name] = torch.stack(each).mean(0)
    return {**means, "road": (means["lerf"] - means["morf"]) / 2}


def filled(
    image: Float[Tensor, "b c h w"],
    removed: Bool[Tensor, "b h w"],
    noise: float = 0.0,
    seed: int = 0,
) -> Float[Tensor, "b c h w"]:
    """Removed pixels replaced by the weighted mean of their neighbours, all solved together.

    The direct neighbours weigh 1/6, the diagonal ones 1/12; those outside the image are left out.
    An image that is removed whole becomes 0.

    Source: Rong et al. 2022, noisy linear interpolation.
    """
    pairs = zip(image.detach().cpu().double().numpy(), removed.cpu().numpy(), strict=True)
    solved = np.stack([_solve(one, gone) for one, gone in pairs])
    drawn = torch.randn(image.shape[1:], generator=torch.Generator().manual_seed(seed))
    replaced = torch.from_numpy(solved).to(image) + noise * drawn.to(image)
    return torch.where(removed[:, None], replaced, image)


def _solve(image: NDArray[np.float64], gone: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The image (c, h, w) with the pixels that are gone interpolated."""
    count = int(gone.sum())
    if count in (0, gone.size):
        return np.where(gone, 0.0, image)
    number = np.cumsum(gone).reshape(gone.shape) - 1
    rows, columns = np.nonzero(gone)
    own, known_part = np.zeros(count), np.zeros((count, len(image)))
    entries: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for down, right, weight in NEIGHBOURS:
        y, x = rows + down, columns + right
        inside = (y >= 0) & (y < gone.shape[0]) & (x >= 0) & (x < gone.shape[1])
        here, y, x = np.nonzero(inside)[0], y[inside], x[inside]
        own[here] += weight
        also = gone[y, x]
        entries.append((here[also], number[y[also], x[also]], np.full(also.sum(), -weight)))
        known_part[here[~also]] += weight * image[:, y[~also], x[~also]].T
    entries.append((np.arange(count), np.arange(count), own))
    line, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    system = coo_matrix((value, (line, column)), (count, count)).tocsc()
    result = image.copy()
    result[:, gone] = spsolve(system, known_part).reshape(count, -1).T
    return result
