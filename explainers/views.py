"""Averaging of any explainer's maps over random geometric views (Eq. 11), and smoothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int64
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_affine_matrix2d, warp_affine
from torch import Tensor

from explainers.batches import in_batches, in_parts

Saliency = Callable[[Tensor, Tensor], Tensor]
SEEN = 0.999  # least share of a pixel that must survive the way there and back to count in a view


@dataclass(frozen=True)
class Views:
    """K random geometric transforms, drawn once from the seed and the same for every image.

    The paper's ranges are lost; these are choices, to be validated per data set.

    Attributes:
        count: K, the number of views; 0 gives the plain map.
        rotation: Largest angle, degrees, drawn from [-rotation, rotation].
        translation: Largest shift along each axis, share of the image side.
        zoom: Largest change of scale: 0.1 draws from [0.9, 1.1].
        horizontal_flip: Probability.
        vertical_flip: Probability.
        seed: Of the draw.
        work_batch: Most images that go through the explainer at once.

    Raises:
        ValueError: If a count is too small, a zoom or shift leaves nothing of the image, or a
            probability is none.
    """

    count: int = 10
    rotation: float = 15.0
    translation: float = 0.08
    zoom: float = 0.1
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    seed: int = 0
    work_batch: int = 64

    def __post_init__(self) -> None:
        """Check the user's values."""
        if self.count < 0 or self.work_batch < 1:
            raise ValueError(
                "views need a count of 0 or more and a work_batch of 1 or more, but got "
                f"{self.count} and {self.work_batch}."
            )
        for name in ("zoom", "translation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} of the views must be in [0, 1), but got {getattr(self, name)}."
                )
        for name in ("horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} of the views is a probability in [0, 1], but got "
                    f"{getattr(self, name)}."
                )

    def matrices(self, height: int, width: int) -> Float[Tensor, "k 2 3"]:
        """Forward transforms T_k of pixel coordinates."""
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(self.count, 6, generator=generator)
        signed = 2 * uniform[:, :4] - 1
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(self.count, 2)
        affine = get_affine_matrix2d(
            signed[:, :2] * self.translation * torch.tensor([width, height]),
            centre,
            (1 + signed[:, 2:3] * self.zoom).expand(-1, 2),
            signed[:, 3] * self.rotation,
        )
        flips = 1 - 2 * (uniform[:, 4:] < torch.tensor([self.horizontal_flip, self.vertical_flip]))
        flip = torch.diag_embed(torch.cat([flips, torch.ones(self.count, 1)], 1))
        flip[:, :2, 2] = centre * (1 - flips)
        return (affine @ flip)[:, :2]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def laid_out(
    views: Views, height: int, width: int
) -> tuple[Float[Tensor, "k 2 3"], Float[Tensor, "k 2 3"], Bool[Tensor, "k h w"]]:
    """Transforms there and back, and the pixels that each view sees, computed once for a size."""
    forward = views.matrices(height, width)
    back = inverse(forward)
    return forward, back, seen_pixels(forward, back, height, width)


def seen_pixels(
    forward: Float[Tensor, "k 2 3"], back: Float[Tensor, "k 2 3"], height: int, width: int
) -> Bool[Tensor, "k h w"]:
    """Pixels whose value survives each view's way there and back (m_k of Eq. 11)."""
    there = warp(forward.new_ones(len(forward), 1, height, width), forward, "zeros")
    return warp(there, back, "zeros")[:, 0] >= SEEN


def inverse(matrices: Float[Tensor, "k 2 3"]) -> Float[Tensor, "k 2 3"]:
    """Transforms that undo ``matrices``."""
    linear = torch.linalg.inv(matrices[:, :, :2])
    return torch.cat([linear, -linear @ matrices[:, :, 2:]], 2)


def warp(
    image: Float[Tensor, "b c h w"], matrices: Float[Tensor, "b 2 3"], padding: str = "border"
) -> Float[Tensor, "b c h w"]:
    """Image under the transforms, bilinear, pixel centres on whole coordinates."""
    size = (image.shape[2], image.shape[3])
    return warp_affine(image, matrices, size, padding_mode=padding, align_corners=True)


def average_over_views(
    saliency: Saliency,
    image: Float[Tensor, "b c h w"],
    target: Int64[Tensor, " b"],
    views: Views | None,
) -> Float[Tensor, "b h w"]:
    """Average of the maps of K views, each warped back (Eq. 11); the plain map without views.

    E_avg = sum_k m_k T_k^-1(E(T_k(x))) / sum_k m_k, with m_k = 1 where an all-ones image warped
    there and back keeps at least 0.999. A pixel that no view saw takes the plain map.

    Args:
        saliency: Maps (n, h, w) of images and their targets.
        image: In [0, 1]; borders are repeated where a view looks outside.
        target: Decided once on the image itself, the same for all its views.
        views: The transforms; None or ``count`` 0 is off.

    Source: arXiv:2012.07332, Sec. III-D; the treatment of unseen pixels is ours.
    """
    if views is None or views.count == 0:
        return in_batches(saliency, image, target, views.work_batch if views else len(image))
    k, b, (height, width) = views.count, len(image), image.shape[2:]
    forward, back, seen = (part.to(image) for part in laid_out(views, height, width))
    total = image.new_zeros(b, height, width)

    def add(pair: Tensor) -> None:
        which, view = pair // k, pair % k
        maps = saliency(warp(image[which], forward[view]), target[which])
        maps = warp(maps[:, None], back[view], "zeros")[:, 0] * seen[view]
        total.index_add_(0, which, maps.to(total))

    in_parts(add, b * k, views.work_batch, image.device)
    count = seen.sum(0)
    average = total / count.clamp(min=1)
    if (count > 0).all():
        return average
    return average.where(count > 0, in_batches(saliency, image, target, views.work_batch))


def smooth(saliency: Float[Tensor, "b h w"], sigma: float) -> Float[Tensor, "b h w"]:
    """Gaussian over each map, ``sigma`` as a share of the image's shorter side; 0 is off.

    Borders are reflected; the kernel reaches three sigmas, on tiny maps as far as a reflection can.

    Raises:
        ValueError: If sigma is negative or above 0.3.
    """
    if not 0 <= sigma <= 0.3:
        raise ValueError(f"smoothing is a share of the image side in [0, 0.3], but got {sigma}.")
    side = min(saliency.shape[1:])
    pixels = sigma * side
    reach = min(round(3 * pixels), side - 1)
    if reach == 0:
        return saliency
    blurred = gaussian_blur2d(saliency[:, None], 2 * reach + 1, (pixels, pixels), "reflect")
    return blurred[:, 0]


def blurred(image: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
    """Images under the Gaussian of `smooth`, channel by channel."""
    return smooth(image.flatten(0, 1), sigma).view_as(image)
