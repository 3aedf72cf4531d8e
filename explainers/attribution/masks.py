"""Masks optimised for each image: BBMP and extremal perturbation.

Images run together in batches; each has its own optimiser state, and random draws are the same for
all, so that a map never depends on its neighbours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from classifiers.network import Network, probabilities
from explainers.attribution.scores import ClassScores, at_least_one, gradients_on
from explainers.base import Explainer
from explainers.batches import in_batches
from explainers.views import blurred


class BBMP(Explainer):
    """Smallest smooth mask whose blur takes the target's probability away; the map is 1 - mask.

    Args:
        network: Classifier to explain.
        steps: Of Adam.
        learning_rate: Of Adam.
        cell: Side of the mask's cells, share of the image side.
        area: Weight of the sum of 1 - mask over its cells.
        variation: Weight of the sum of the mask's differences to the power ``exponent``.
        exponent: Of the total variation.
        blur: Sigma of the blurred image that stands for nothing, share of the image side.
        jitter: Largest shift of the image under the mask, share of the image side.
        seed: Of the shifts.
        work_batch: Most images at once.

    Raises:
        ValueError: If ``steps`` or ``work_batch`` is below 1.

    Source: Fong and Vedaldi 2017, arXiv:1704.03296, Eq. 4 and Sec. 4.3; the mask starts at 0.5, not
    at a disk, and is kept in [0, 1] by clipping.
    """

    def __init__(
        self,
        network: Network,
        steps: int = 300,
        learning_rate: float = 0.1,
        cell: float = 4 / 224,
        area: float = 1e-4,
        variation: float = 1e-2,
        exponent: float = 3.0,
        blur: float = 10 / 224,
        jitter: float = 4 / 224,
        seed: int = 0,
        work_batch: int = 32,
    ) -> None:
        self.network, self.learning_rate, self.cell = network, learning_rate, cell
        self.area, self.variation, self.exponent = area, variation, exponent
        self.blur, self.jitter, self.seed = blur, jitter, seed
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """1 - mask at the image's size, in [0, 1]."""
        with gradients_on(image, target) as (free, wanted):
            return in_batches(self._optimise, free, wanted, self.work_batch)

    def _optimise(self, image: Tensor, target: Tensor) -> Tensor:
        mask = image.new_full((len(image), 1, *grid(image, self.cell)), 0.5).requires_grad_()
        optimiser = torch.optim.Adam([mask], self.learning_rate)
        reach = round(self.jitter * min(image.shape[2:]))
        generator = torch.Generator().manual_seed(self.seed)
        shifts = torch.randint(-reach, reach + 1, (self.steps, 2), generator=generator)
        nothing = blurred(image, self.blur)
        for rows, columns in shifts.tolist():
            large = self._upsampled(mask, image)
            mixed = large * image.roll((rows, columns), (2, 3))
            mixed = mixed + (1 - large) * nothing.roll((rows, columns), (2, 3))
            kept = probabilities(self.network(mixed)).gather(1, target[:, None]).sum()
            removed, rough = (1 - mask).sum(), variation(mask, self.exponent)
            optimiser.zero_grad()
            (kept + self.area * removed + self.variation * rough).backward()
            optimiser.step()
            mask.data.clamp_(0, 1)
        return 1 - self._upsampled(mask.detach(), image)[:, 0]

    def _upsampled(self, mask: Tensor, image: Tensor) -> Tensor:
        """Mask at the image's size, bilinear, then blurred by one of its cells."""
        size = (image.shape[2], image.shape[3])
        return blurred(F.interpolate(mask, size, mode="bilinear", align_corners=False), self.cell)


class ExtremalPerturbation(Explainer):
    """Masks of given areas that keep as much of the target's score as they can; the map adds them.

    Args:
        network: Classifier to explain.
        areas: Of the masks, shares of the image.
        steps: Of gradient descent with momentum 0.9.
        learning_rate: Of the descent.
        cell: Side of the mask's cells, share of the image side.
        sigma: Of the bell that is the smallest part of a mask, share of the image side.
        area_weight: Of the mean squared deviation from a mask of the area, at the last step; it
            grows linearly from 0, so that the score decides where the mask closes in.
        levels: Blurred images from the image itself to the one that stands for nothing.
        blur: Sigma of the latter, share of the image side.
        work_batch: Most masks, images times areas, at once.

    Raises:
        ValueError: If an area is outside (0, 1), ``steps`` or ``work_batch`` below 1 or ``levels``
            below 2.

    Source: Fong et al. 2019, arXiv:1910.08485, Eqs. 3 to 5. The bell, its reach of two sigmas,
    the temperature of the smooth maximum, the start at the whole image and the growing weight of
    the area are ours.
    """

    temperature = 0.05  # of the smooth maximum

    def __init__(
        self,
        network: Network,
        areas: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2),
        steps: int = 800,
        learning_rate: float = 0.01,
        cell: float = 7 / 224,
        sigma: float = 21 / 224,
        area_weight: float = 300.0,
        levels: int = 8,
        blur: float = 20 / 224,
        work_batch: int = 32,
    ) -> None:
        if not areas or not all(0 < area < 1 for area in areas):
            raise ValueError(f"areas are shares of the image in (0, 1), but got {areas}.")
        if levels < 2:
            raise ValueError(f"levels must be 2 or more, but got {levels}.")
        self.network, self.areas, self.learning_rate = network, areas, learning_rate
        self.cell, self.sigma, self.area_weight = cell, sigma, area_weight
        self.levels, self.blur = levels, blur
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.scores = ClassScores(network)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Sum of the masks at the image's size, in [0, number of areas]."""
        with gradients_on(image, target) as (free, wanted):
            return in_batches(
                self._optimise, free, wanted, max(self.work_batch // len(self.areas), 1)
            )

    def _optimise(self, image: Tensor, target: Tensor) -> Tensor:
        count = len(self.areas)
        pyramid = torch.stack(
            [blurred(image, self.blur * k / (self.levels - 1)) for k in range(self.levels)], 1
        ).repeat_interleave(count, 0)
        wanted = target.repeat_interleave(count)[:, None]
        size = (image.shape[2], image.shape[3])
        ideal = torch.stack([sorted_mask(area, size[0] * size[1]) for area in self.areas]).to(image)
        ideal = ideal.repeat(len(image), 1)
        free = image.new_ones(len(wanted), 1, *grid(image, self.cell)).requires_grad_()
        optimiser = torch.optim.SGD([free], self.learning_rate, momentum=0.9)
        for step in range(self.steps):
            mask = self._mask(free, size)
            score = self.scores(at_blur(pyramid, 1 - mask)).gather(1, wanted).sum()
            deviation = (mask.flatten(1).sort(1).values - ideal).square().mean(1).sum()
            optimiser.zero_grad()
            weight = self.area_weight * (step + 1) / self.steps  # the score sets the order first
            (weight * deviation - score).backward()
            optimiser.step()
            free.data.clamp_(0, 1)
        masks = self._mask(free.detach(), size)[:, 0]
        return masks.view(len(image), count, *size).sum(1)

    def _mask(self, free: Tensor, size: tuple[int, int]) -> Tensor:
        soft = smooth_max(free, self.sigma / self.cell, self.temperature)
        return F.interpolate(soft, size, mode="bilinear", align_corners=False)


def grid(image: Float[Tensor, "b c h w"], cell: float) -> tuple[int, int]:
    """Cells along each side; at least 2."""
    count = max(round(1 / cell), 2)
    height, width = image.shape[2:]
    short = min(height, width)
    return round(count * height / short), round(count * width / short)


def variation(mask: Float[Tensor, "b 1 h w"], exponent: float) -> Float[Tensor, ""]:
    """Sum of the absolute differences along both axes to a power, over all masks."""
    rows, columns = mask.diff(dim=2).abs(), mask.diff(dim=3).abs()
    return rows.pow(exponent).sum() + columns.pow(exponent).sum()


def sorted_mask(area: float, pixels: int) -> Float[Tensor, " n"]:
    """Ascending values of a mask of the area: zeros, then ones."""
    return (torch.arange(pixels) >= round((1 - area) * pixels)).float()


def smooth_max(
    values: Float[Tensor, "b 1 h w"], sigma: float, temperature: float
) -> Float[Tensor, "b 1 h w"]:
    """Smooth maximum over the surroundings of values times a bell (Eq. 5).

    Args:
        values: In [0, 1]; 0 outside.
        sigma: Of the bell, cells.
        temperature: T of sum f exp(f / T) / sum exp(f / T); the maximum for T to 0.
    """
    reach = max(round(2 * sigma), 1)
    offset = torch.arange(-reach, reach + 1, device=values.device, dtype=values.dtype)
    bell = (-(offset[:, None].square() + offset.square()) / (2 * sigma**2)).exp().flatten()
    around = F.unfold(values, 2 * reach + 1, padding=reach) * bell[:, None]
    weight = (around / temperature).softmax(1)
    return (around * weight).sum(1).view_as(values)


def at_blur(
    pyramid: Float[Tensor, "b n c h w"], level: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b c h w"]:
    """Each pixel from the two nearest levels of a pyramid; 0 is its first level, 1 its last."""
    last = pyramid.shape[1] - 1
    depth = torch.arange(last + 1, device=level.device, dtype=level.dtype)[:, None, None]
    share = (1 - (last * level - depth).abs()).clamp(min=0)
    return (share[:, :, None] * pyramid).sum(1)
