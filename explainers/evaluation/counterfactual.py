"""Generated images against the real image of the other class, where the data set has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from explainers.evaluation.compare import Batch, Generator, Rows, gathered, long_form
from explainers.evaluation.metrics.generated import image_similarity


def score_counterfactuals(
    name: str,
    generate: Generator,
    real: Callable[[str], Tensor | None],
    batches: Iterable[Batch],
    device: torch.device,
) -> Rows:
    """SSIM and PSNR of x, x_s and x_a against the real counterpart, inside and outside the mask.

    The scores of x tell how far an unchanged image is from it. Of images with a mask whose column
    "counterpart" names such an image; infinite PSNR (identical there) is left out.

    Args:
        name: Of the row.
        generate: Gives x_s and x_a, in [0, 1].
        real: Image (c, h, w) in [0, 1] by its id; None where the split has none of that id.
        batches: Of a split.
        device: Where the generator is.
    """
    rows: Rows = []
    for batch in batches:
        named = batch["columns"].get("counterpart", [""] * len(batch["id"]))
        found = {k: real(named[k]) for k in batch["has_mask"].nonzero()[:, 0].tolist()}
        pairs = {k: image for k, image in found.items() if image is not None}
        if not pairs:
            continue
        chosen, target = list(pairs), torch.stack(list(pairs.values())).to(device)
        image, mask = (batch[part][chosen].to(device) for part in ("image", "mask"))
        with torch.inference_mode():
            similar, adversarial = generate(image)
        scores = {}
        for kind, one in {"x": image, "xs": similar, "xa": adversarial}.items():
            for part, region in {"inside": mask, "outside": ~mask}.items():
                ssim, psnr = image_similarity(one, target, region)
                scores[f"ssim_{kind}_real_{part}"] = ssim
                scores[f"psnr_{kind}_real_{part}"] = psnr.where(psnr.isfinite(), torch.nan)
        row = {"method": name, "views": "plain", "smoothing": "raw"}
        rows += long_form([batch["id"][k] for k in chosen], scores, row)
    return [row for row in gathered(rows) if row["value"] == row["value"]]
