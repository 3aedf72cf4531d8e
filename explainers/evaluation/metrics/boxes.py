"""Boxes around the parts of thresholded maps, and pixels of a whole data set (Choe et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_iou

from explainers.evaluation.metrics.scaling import min_max

THRESHOLDS = 1000
TOUCHING = np.ones((3, 3))  # pixels that touch at a corner are one part


def best_box_ious(
    saliency: Float[Tensor, "b h w"],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    parts: Literal["largest", "any"] = "any",
    thresholds: int = THRESHOLDS,
) -> Float64[Tensor, "b t"]:
    """Highest IoU at each threshold between a box of the map's parts and an annotated one.

    The map is scaled to [0, 1] by its own range and cut strictly above k / ``thresholds``, k = 0 ..
    ``thresholds`` - 1. 0 where nothing is above; NaN for an image without boxes.

    Args:
        saliency: Maps.
        boxes: Of each image: x0, y0, x1, y1 in pixels of the map, half-open.
        parts: "largest" takes the box of the largest connected part alone (version 1), "any" those
            of all (version 2).
        thresholds: Number of thresholds.

    Source: Choe et al. 2020. Departures from their code: boxes are half-open, theirs are a pixel
    larger; parts are counted in pixels, theirs by the area inside the outline, where holes have
    outlines of their own.
    """
    scaled = min_max(saliency).detach().cpu().double().numpy()
    pairs = zip(scaled, boxes, strict=True)
    return torch.stack([_ious_of_image(one, box.cpu(), parts, thresholds) for one, box in pairs])


def _ious_of_image(
    scaled: NDArray[np.float64], boxes: Tensor, parts: str, thresholds: int
) -> Float64[Tensor, " t"]:
    """Thresholds between the same two values of the map are worked out once."""
    if not len(boxes):
        return torch.full((thresholds,), torch.nan, dtype=torch.float64)
    above = np.searchsorted(np.sort(scaled, None), np.arange(thresholds) / thresholds, "right")
    _, first, same = np.unique(above, return_index=True, return_inverse=True)
    found = [_best_iou(scaled > k / thresholds, boxes, parts) for k in first]
    return torch.tensor(found, dtype=torch.float64)[torch.from_numpy(same)]


def _best_iou(kept: NDArray[np.bool_], boxes: Tensor, parts: str) -> float:
    labels, count = label(kept, TOUCHING)
    if not count:
        return 0.0
    found = find_objects(labels)
    if parts == "largest":
        found = [found[int(np.bincount(labels.ravel())[1:].argmax())]]
    corners = [(x.start, y.start, x.stop, y.stop) for y, x in found]
    return float(box_iou(torch.tensor(corners).double(), boxes.double()).max())


class MaxBoxAccuracy(Metric):
    """Share of images whose box is found, at the threshold where that share is the highest.

    ``MaxBoxAccuracy("largest", (0.5,))`` is MaxBoxAcc, the default MaxBoxAccV2. The best threshold
    is taken on the images that are scored, as Choe et al. do: an upper bound, not a test score.

    Args:
        parts: See `best_box_ious`.
        ious: An image counts where the IoU is at least this.
        thresholds: Number of thresholds.
    """

    full_state_update = False
    found: Tensor
    count: Tensor

    def __init__(
        self,
        parts: Literal["largest", "any"] = "any",
        ious: Sequence[float] = (0.3, 0.5, 0.7),
        thresholds: int = THRESHOLDS,
    ) -> None:
        super().__init__()
        self.parts, self.ious, self.thresholds = parts, tuple(ious), thresholds
        self.add_state("found", torch.zeros(len(self.ious), thresholds).long(), "sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, saliency: Float[Tensor, "b h w"], boxes: Sequence[Float[Tensor, "_ 4"]]
    ) -> None:
        """Add a batch; images without boxes are not counted."""
        best = best_box_ious(saliency, boxes, self.parts, self.thresholds).to(self.found.device)
        least = torch.tensor(self.ious, device=best.device)[:, None, None]
        self.found = self.found + (best >= least).sum(1)
        self.count = self.count + (~best[:, 0].isnan()).sum()

    def compute(self) -> dict[str, Tensor]:
        """Mean over the IoUs ("max_box_accuracy"), each of them ("at_0.5", ...), and "count"."""
        best = self.found.amax(1) / self.count
        each = {f"at_{iou:g}": share for iou, share in zip(self.ious, best, strict=True)}
        return {"max_box_accuracy": best.mean(), **each, "count": self.count.double()}


def pixel_histograms(
    scaled: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"], bins: int = THRESHOLDS
) -> Int64[Tensor, "2 bins"]:
    """Pixels of all images outside and inside the masks, by value; the last bin is value 1.

    Args:
        scaled: In [0, 1], of `min_max`.
        mask: True inside the evidence; pixels of images without any count as outside.
        bins: Bins below 1, each closed below.
    """
    index = (scaled.double() * bins).long() + (bins + 1) * mask
    return index.flatten().bincount(minlength=2 * (bins + 1)).view(2, bins + 1)


def pixel_average_precision(histograms: Int64[Tensor, "2 bins"]) -> Float64[Tensor, ""]:
    """PxAP: area under the precision and recall of all pixels of a data set; NaN without a mask.

    Source: Choe et al. 2020.
    """
    outside, inside = histograms.flip(1).cumsum(1)
    precision = inside / (inside + outside).clamp(min=1).double()
    recall = inside / inside[-1].double()
    area: Tensor = (precision * recall.diff(prepend=recall.new_zeros(1))).sum()
    return area


class PixelAveragePrecision(Metric):
    """PxAP of maps scaled by their own range, over all pixels of the images with a mask."""

    full_state_update = False
    histograms: Tensor

    def __init__(self, bins: int = THRESHOLDS) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("histograms", torch.zeros(2, bins + 1).long(), dist_reduce_fx="sum")

    def update(self, saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]) -> None:
        """Add a batch; images with an empty mask are not counted."""
        counted = mask.flatten(1).any(1)
        found = pixel_histograms(min_max(saliency[counted]), mask[counted], self.bins)
        self.histograms = self.histograms + found

    def compute(self) -> Tensor:
        """In [0, 1], NaN if no image was counted."""
        return pixel_average_precision(self.histograms)
