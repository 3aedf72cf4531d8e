"""Generated images against the real image of the other class, where the data set has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from explainers.evaluation.metrics.generated import image_similarity

Real = Callable[[str], Tensor | None]


def counterpart_scores(
    batch: Mapping[str, Any], images: Mapping[str, Float[Tensor, "b c h w"]], real: Real
) -> tuple[Sequence[str], dict[str, Tensor]]:
    """SSIM and PSNR of images against the real counterpart, inside and outside the mask.

    Of images with a mask whose column "counterpart" names such an image; infinite PSNR (identical
    there) is NaN.

    Args:
        batch: Of a split.
        images: By the name they have in the table: "x", whose scores tell how far an unchanged
            image is from its counterpart, "xs" and "xa".
        real: Image (c, h, w) in [0, 1] by its id; None where the split has none of that id.

    Returns:
        Ids of the images that have a counterpart, and their scores by metric.
    """
    named = batch["columns"].get("counterpart", [""] * len(batch["id"]))
    found = {k: real(named[k]) for k in batch["has_mask"].nonzero()[:, 0].tolist()}
    pairs = {k: image for k, image in found.items() if image is not None}
    scores: dict[str, Tensor] = {}
    if not pairs:
        return [], scores
    chosen = list(pairs)
    target = torch.stack(list(pairs.values())).to(images["x"])
    mask = batch["mask"][chosen].to(target.device)
    for kind, generated in images.items():
        for part, region in {"inside": mask, "outside": ~mask}.items():
            ssim, psnr = image_similarity(generated[chosen], target, region)
            scores[f"ssim_{kind}_real_{part}"] = ssim
            scores[f"psnr_{kind}_real_{part}"] = psnr.where(psnr.isfinite(), torch.nan)
    return [batch["id"][k] for k in chosen], scores
