"""Duo: two separate U-Nets (arXiv:2012.07332, Sec. IV-C)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.learned.generators import Geometry, trainable
from explainers.learned.similar_adversarial import SimilarAdversarial, Weights


class Duo(SimilarAdversarial):
    """Two U-Nets of one geometry, one per output; L_G compares all their trainable weights.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        weights: Of the objective's terms.
        geometry: Of each U-Net.
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
        super().__init__(network, weights, geometry, optimisation, objective, margin)
        self.similar_generator = self._generator()
        self.adversarial_generator = self._generator()

    def _generator(self) -> nn.Sequential:
        unet, features = self.geometry.build()
        return nn.Sequential(unet, self.geometry.head(features))

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Similar and adversarial image, each (b, c, h, w) in [0, 1]."""
        generators = self.similar_generator, self.adversarial_generator
        similar, adversarial = (self.geometry.draw(g(image), image) for g in generators)
        return similar, adversarial

    def paired_weights(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Trainable weights of the two generators."""
        return trainable(self.similar_generator), trainable(self.adversarial_generator)
