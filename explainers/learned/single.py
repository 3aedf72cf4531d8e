"""Single: one shared U-Net and two small heads (arXiv:2012.07332, Sec. IV-C)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.learned.generators import Geometry
from explainers.learned.similar_adversarial import SimilarAdversarial, Weights


class Single(SimilarAdversarial):
    """Single_k: a shared U-Net, then two identical CNNs of k 3x3 convolutions, one per output.

    L_G compares the weights of the two CNNs.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        convolutions: k; "authors" is the head of their public code (3x3, 3x3, 1x1).
        weights: Of the objective's terms.
        geometry: Of the U-Net.
        optimisation: Optimiser and schedule.
        objective: "cross_entropy", "margin", or "auto" by the number of logits.
        margin: m of Eq. 10, logits.

    Raises:
        ValueError: If ``convolutions`` is below 1, or as `SimilarAdversarial`.
    """

    def __init__(
        self,
        network: Network | str,
        convolutions: int | Literal["authors"] = 2,
        weights: Weights | None = None,
        geometry: Geometry | None = None,
        optimisation: Optimisation | None = None,
        objective: Literal["auto", "cross_entropy", "margin"] = "auto",
        margin: float = 1.0,
    ) -> None:
        super().__init__(network, weights, geometry, optimisation, objective, margin)
        if convolutions != "authors" and convolutions < 1:
            raise ValueError(f"convolutions must be 1 or more, but got {convolutions}.")
        self.convolutions = convolutions
        self.unet, features = self.geometry.build()
        self.similar_head = self.geometry.head(features, convolutions)
        self.adversarial_head = self.geometry.head(features, convolutions)

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Similar and adversarial image, each (b, c, h, w) in [0, 1]."""
        features = self.unet(image)
        heads = self.similar_head, self.adversarial_head
        similar, adversarial = (self.geometry.draw(head(features), image) for head in heads)
        return similar, adversarial

    def paired_weights(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Weights of the two heads."""
        return self.similar_head.parameters(), self.adversarial_head.parameters()

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network."""
        return {"convolutions": self.convolutions, **super().arguments()}
