"""A score of a learned explainer's maps that needs no annotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from classifiers.network import Network
from explainers.base import Explainer
from explainers.evaluation.callbacks import Batch, StageCallback
from explainers.evaluation.metrics import ImageMean
from explainers.evaluation.metrics.localisation import average_precision
from explainers.views import Views


def highest(saliency: Float[Tensor, "b h w"], share: float) -> Bool[Tensor, "b h w"]:
    """The pixels of each map at or above its own (1 - share) quantile.

    Args:
        saliency: Only the order of its values counts.
        share: Of the pixels, in (0, 1).
    """
    threshold = saliency.flatten(1).quantile(1 - share, dim=1)
    return saliency >= threshold[:, None, None]


def witnessed(
    saliency: Float[Tensor, "b h w"], witness: Float[Tensor, "b h w"], share: float
) -> Float64[Tensor, " b"]:
    """Average precision of each map, the highest values of a witness's map standing for a mask.

    Args:
        saliency: The maps that are judged.
        witness: Another method's maps of the same images.
        share: Of the witness's pixels that stand for the mask, in (0, 1).

    Returns:
        In [0, 1]; about ``share`` for a random map.

    Source: this project's own; how good a choice it makes stands in benchmarks/README.md.
    """
    return average_precision(saliency, highest(witness, share))


class WitnessAgreement(StageCallback):
    """How well the maps find what other methods' maps show: no image needs a mask.

    The mean of `witnessed` over the images, logged as ``witness/<name>``. Weights, epochs and
    generators can be chosen by it where nothing is annotated. The maps of the other methods are
    computed once for each image.

    Args:
        witnesses: The other methods by name, built for the explainer's classifier.
        views: Geometric views that all maps are averaged over; ten by default.
        smoothing: Of all maps, sigma as a share of the image side.
        share: Of a witness's pixels that stand for a mask.
        every_n_epochs: Training epochs between two computations.

    Raises:
        ValueError: If there is no witness, or ``share`` is outside (0, 1).
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
        self.shown: dict[tuple[str, str], Tensor] = {}  # maps, by witness and image

    def reset(self, module: LightningModule) -> None:
        """Start a mean for each witness."""
        score = partial(witnessed, share=self.share)
        self.means = {name: ImageMean(score).to(module.device) for name in self.witnesses}

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Compare the maps of a batch."""
        assert isinstance(module, Explainer)
        image = batch["image"]
        saliency = module.explain(image, views=self.views, smoothing=self.smoothing)
        for name, mean in self.means.items():
            mean.update(saliency, self._maps(name, module, image, batch["id"]))

    def _maps(self, name: str, module: Explainer, image: Tensor, ids: list[str]) -> Tensor:
        """A witness's maps of a batch, from memory where it was seen before."""
        if any((name, one) not in self.shown for one in ids):
            assert isinstance(module.network, Network)
            witness = self.witnesses[name](module.network)
            maps = witness.explain(image, views=self.views, smoothing=self.smoothing).cpu()
            self.shown |= {(name, one): each for one, each in zip(ids, maps, strict=True)}
        return torch.stack([self.shown[name, one] for one in ids]).to(image)

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Any]:
        """Means over all images."""
        return {f"witness/{name}": mean.compute()["mean"] for name, mean in self.means.items()}
