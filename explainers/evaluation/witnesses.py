"""A score of a learned explainer's maps that needs no annotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from classifiers.network import Network
from explainers.base import Explainer
from explainers.evaluation.callbacks import Batch, StageCallback
from explainers.evaluation.metrics import ImageMean
from explainers.evaluation.metrics.localisation import average_precision
from explainers.views import Views


def highest(saliency: Float[Tensor, "b h w"], share: float) -> Bool[Tensor, "b h w"]:
    """The highest values of each map, ties at the lowest of them included; none of a constant map.

    Args:
        saliency: Only the order of its values counts.
        share: Of the pixels, in (0, 1); at least one.
    """
    flat = saliency.flatten(1)
    count = max(round(share * flat.shape[1]), 1)
    threshold = flat.kthvalue(flat.shape[1] - count + 1).values
    varies = flat.amax(1) > flat.amin(1)
    return (saliency >= threshold[:, None, None]) & varies[:, None, None]


class WitnessAgreement(StageCallback):
    """How well the maps find what other methods' maps show: no image needs a mask.

    Mean average precision, the `highest` values of the other method's map standing for a mask,
    logged as ``witness/<name>``; about ``share`` for random maps. Weights, epochs and generators
    can be chosen by it where nothing is annotated. An image whose other map is constant does not
    count. The maps of the other methods are computed once for each image.

    Args:
        witnesses: The other methods by name, built for the explainer's classifier.
        views: Geometric views that all maps are averaged over; ten by default.
        smoothing: Of all maps, sigma as a share of the image side.
        share: Of a witness's pixels that stand for a mask.
        every_n_epochs: Training epochs between two computations.

    Raises:
        ValueError: If there is no witness, or ``share`` is outside (0, 1).

    Source: this project's own; how good a choice it makes stands in benchmarks/README.md.
    """

    def __init__(
        self,
        witnesses: Mapping[str, Callable[[Network], Explainer]],
        views: Views | None = None,
        smoothing: float = 0.03,
        share: float = 0.05,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs)
        if not witnesses:
            raise ValueError("witnesses must name a method, such as Gradient, but got none.")
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), but got {share}.")
        self.witnesses, self.share = dict(witnesses), share
        self.views, self.smoothing = views or Views(vertical_flip=0.0), smoothing
        self.shown: dict[tuple[str, str], Tensor] = {}  # masks, by witness and image

    def reset(self, module: LightningModule) -> None:
        """Start a mean for each witness."""
        self.means = {
            name: ImageMean(average_precision).to(module.device) for name in self.witnesses
        }

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Compare the maps of a batch."""
        assert isinstance(module, Explainer)
        image = batch["image"]
        saliency = module.explain(image, views=self.views, smoothing=self.smoothing)
        for name, mean in self.means.items():
            mean.update(saliency, self._masks(name, module, image, batch["id"]))

    def _masks(self, name: str, module: Explainer, image: Tensor, ids: list[str]) -> Tensor:
        """What a witness shows of a batch, from memory where it was seen before."""
        if any((name, one) not in self.shown for one in ids):
            assert isinstance(module.network, Network)
            witness = self.witnesses[name](module.network)
            maps = witness.explain(image, views=self.views, smoothing=self.smoothing)
            masks = highest(maps, self.share).cpu()
            self.shown |= {(name, one): each for one, each in zip(ids, masks, strict=True)}
        return torch.stack([self.shown[name, one] for one in ids]).to(image.device)

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Any]:
        """Means over all images."""
        return {f"witness/{name}": mean.compute()["mean"] for name, mean in self.means.items()}
