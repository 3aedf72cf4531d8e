"""The naive adversarial explainer (arXiv:2012.07332, Eq. 1 and 2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.learned.generators import Geometry
from explainers.learned.similar_adversarial import SimilarAdversarial, Weights


class Adversarial(SimilarAdversarial):
    """One U-Net; the image itself stands for the similar one: E(x) = abs(x - g_a(x)) (Eq. 1).

    Its objective (Eq. 2) is l_a d(x, x_a) + c_a BCE(f(x_a), 1 - y) + t TV(x - x_a): the weights of
    the terms with a similar image are taken as 0.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        weights: Of the objective's terms; ``adversarial``, ``classify_adversarial`` and
            ``variation`` are used.
        geometry: Of the U-Net.
        optimisation: Optimiser and schedule.
        objective: "cross_entropy", "margin", or "auto" by the number of logits.
        margin: m of Eq. 10, logits.

    Raises:
        ValueError: As `SimilarAdversarial`.
    """

    def __init__(
        self,
        network: Network | str,
        weights: Weights | None = None,
        geometry: Geometry | None = None,
        optimisation: Optimisation | None = None,
        objective: Literal["auto", "cross_entropy", "margin"] = "auto",
        margin: float = 1.0,
    ) -> None:
        own = replace(weights or Weights(), similar=0, pair=0, classify_similar=0, proximity=0)
        super().__init__(network, own, geometry, optimisation, objective, margin)
        unet, features = self.geometry.build()
        self.generator = nn.Sequential(unet, self.geometry.head(features))

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """The image itself, and its adversarial image (b, c, h, w) in [0, 1]."""
        return image, self.geometry.draw(self.generator(image), image)
