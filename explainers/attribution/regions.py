"""XRAI: segments of the image ranked by the integrated gradients inside them."""

from __future__ import annotations

import captum.attr
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from skimage.morphology import disk
from skimage.segmentation import felzenszwalb
from skimage.transform import resize
from torch import Tensor
from torch.nn import functional as F

from classifiers.network import Network
from explainers.attribution.gradient import integrated
from explainers.attribution.scores import ClassScores, at_least_one, gradients_on
from explainers.base import Explainer

SCALES = (50, 100, 150, 250, 500, 1200)  # of Felzenszwalb's segmentation at SIDE pixels
SIDE, SIGMA, SMALLEST, RADIUS, LEAST = 224, 0.8, 150, 5, 50


class XRAI(Explainer):
    """Regions added greedily by the mean attribution of the pixels that they bring.

    The regions are Felzenszwalb's segments at six scales, dilated; the attribution is the mean of
    Integrated Gradients from black and from white, its maximum over channels.

    Args:
        network: Classifier to explain.
        steps: Points of Integrated Gradients on each of the two lines.
        work_batch: Most points, of all images together, that go through the network at once.

    Raises:
        ValueError: If ``steps`` or ``work_batch`` is below 1.

    Source: Kapishnikov et al. 2019, arXiv:1906.02825, Algorithm 1 and Sec. 4; settings as in the
    `saliency` package, whose lengths in pixels hold at 224 px and are scaled with the image here.
    """

    def __init__(self, network: Network, steps: int = 100, work_batch: int = 64) -> None:
        self.network = network
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.IntegratedGradients(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Signed map, constant on what each region brought."""
        with gradients_on(image, target) as (free, wanted):
            lines = [
                integrated(self.method, free, wanted, self.steps, self.work_batch, baseline)
                for baseline in (0.0, 1.0)
            ]
        attribution = torch.stack(lines).mean(0).amax(1)
        maps = [ranked(a, segments(x)) for a, x in zip(attribution, image, strict=True)]
        return torch.stack(maps)


def segments(image: Float[Tensor, "c h w"]) -> Bool[Tensor, "n h w"]:
    """Felzenszwalb's segments of an image at six scales, dilated, on the image's device."""
    low, high = image.min(), image.max()
    scaled = 2 * (image - low) / (high - low).clamp(min=1e-12) - 1
    array = scaled.permute(1, 2, 0).double().cpu().numpy()
    options = {"mode": "constant", "preserve_range": True}
    array = resize(array, (SIDE, SIDE), order=3, anti_aliasing=True, **options)
    masks = []
    for scale in SCALES:
        labels = felzenszwalb(array, scale=scale, sigma=SIGMA, min_size=SMALLEST)
        labels = resize(labels, image.shape[1:], order=0, anti_aliasing=False, **options)
        number = torch.from_numpy(labels.astype(np.int64)).to(image.device)
        masks.append(
            number == torch.arange(int(number.max()) + 1, device=image.device)[:, None, None]
        )
    return dilated(torch.cat(masks), round(RADIUS * min(image.shape[1:]) / SIDE))


def dilated(masks: Bool[Tensor, "n h w"], radius: int) -> Bool[Tensor, "n h w"]:
    """Masks grown by a disk."""
    footprint = torch.from_numpy(disk(radius)).to(masks.device, torch.float32)
    grown = F.conv2d(masks[:, None].float(), footprint[None, None], padding=radius)
    return grown[:, 0] > 0.5


def ranked(attribution: Float[Tensor, "h w"], masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "h w"]:
    """Map that gives every pixel the gain of the region that brought it.

    The region whose new pixels have the largest mean attribution comes next; a region with less
    than 0.1 % of the image's pixels to bring is left out. What no region brings gets its own mean.
    """
    flat, inside = attribution.flatten().double(), masks.flatten(1)
    least = LEAST * flat.numel() / SIDE**2
    count, total = inside.sum(1), inside.double() @ flat
    gained, covered = torch.zeros_like(flat), torch.zeros_like(inside[0])
    free = torch.ones_like(count, dtype=torch.bool)
    while (free := free & (count >= least)).any():
        gain = (total / count.clamp(min=1)).masked_fill(~free, -torch.inf)
        best = int(gain.argmax())
        new = inside[best] & ~covered
        gained[new] = gain[best]
        covered |= new
        count = count - inside[:, new].sum(1)
        total = total - inside[:, new].double() @ flat[new]
        free[best] = False
    if not covered.all():
        gained[~covered] = flat[~covered].mean()
    return gained.view_as(attribution).to(attribution)
