"""What Single, Duo and the naive adversarial explainer share: their objective (Eqs. 5 to 10)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from classifiers.network import Network, decide, paired_logits
from classifiers.optimisation import Optimisation
from explainers.learned.base import Generated, LearnedExplainer
from explainers.learned.generators import Geometry
from explainers.learned.losses import (
    decision_loss,
    distance,
    margin_adversarial,
    margin_similar,
    total_variation,
    weight_proximity,
)


@dataclass(frozen=True)
class Weights:
    """Weights of the objective's terms (METHOD.md section 1, Table I); 0 turns a term off.

    Attributes:
        similar: l_s, similar image close to the image (Eq. 6).
        adversarial: l_a, adversarial image close to the image (Eq. 6).
        pair: l_sa, the two close to each other (Eq. 6).
        classify_similar: c_s, similar image decided as before (Eq. 7, 10).
        classify_adversarial: c_a, adversarial image decided otherwise (Eq. 7, 10).
        proximity: w, the two generators' weights close to each other (Eq. 8).
        variation: t, total variation of the difference (Eq. 9).
    """

    similar: float = 1.0
    adversarial: float = 1.0
    pair: float = 0.2
    classify_similar: float = 0.01
    classify_adversarial: float = 0.01
    proximity: float = 0.001
    variation: float = 0.2


class SimilarAdversarial(LearnedExplainer):
    """Generators of a similar and an adversarial image; their absolute difference explains.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        weights: Of the objective's terms.
        geometry: Of the generators.
        optimisation: Optimiser and schedule.
        objective: "cross_entropy" (Eq. 7, one-logit networks) or "margin" (Eq. 10, any network);
            "auto" takes the former for one logit, the latter for several.
        margin: m of Eq. 10, logits.

    Raises:
        ValueError: If the objective does not fit the network, or the data does not fit either.
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
        super().__init__(network, geometry, optimisation)
        self.weights = weights or Weights()
        if objective == "cross_entropy" and self.network.num_logits > 1:
            raise ValueError(
                f"objective 'cross_entropy' needs a one-logit network, this one has "
                f"{self.network.num_logits} logits; use 'margin'."
            )
        one = self.network.num_logits == 1
        automatic = "cross_entropy" if one else "margin"
        self.objective_form = automatic if objective == "auto" else objective
        self.margin = margin

    def paired_weights(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Trainable weights that L_G (Eq. 8) compares, in the same order; none by default."""
        return (), ()

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network, that rebuild this explainer."""
        own = {"weights": asdict(self.weights), "objective": self.objective_form}
        return {**own, "margin": self.margin, **super().arguments()}

    def objective(self, image: Tensor) -> tuple[dict[str, Tensor], Generated]:
        """L = L_S + L_C + L_G + L_R (Eq. 5): its weighted terms with their sum, and the images."""
        weights = self.weights
        with torch.no_grad():
            logits = self.network(image)
        decision = decide(logits, self.network.threshold)
        similar, adversarial = self(image)
        both = self.network(torch.cat([similar, adversarial]))
        logits_similar, logits_adversarial = both.chunk(2)
        kept, flipped = self.classification(logits_similar, logits_adversarial, decision)
        terms = {
            "similar": weights.similar * distance(image, similar),
            "adversarial": weights.adversarial * distance(image, adversarial),
            "pair": weights.pair * distance(similar, adversarial),
            "classify_similar": weights.classify_similar * kept,
            "classify_adversarial": weights.classify_adversarial * flipped,
            "variation": weights.variation * total_variation(similar - adversarial),
        }
        if weights.proximity:
            terms["proximity"] = weights.proximity * weight_proximity(*self.paired_weights())
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms, {
            "loss": terms["loss"],
            "similar": similar,
            "adversarial": adversarial,
            "logits": logits,
            "logits_similar": logits_similar,
            "logits_adversarial": logits_adversarial,
        }

    def classification(
        self, similar: Tensor, adversarial: Tensor, decision: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two classification losses from the generated images' logits (Eq. 7 or 10)."""
        threshold = self.network.threshold
        if self.objective_form == "cross_entropy":
            kept = decision_loss(similar, decision, threshold)
            return kept, decision_loss(adversarial, 1 - decision, threshold)
        kept = margin_similar(paired_logits(similar, threshold), decision, self.margin)
        pairs = paired_logits(adversarial, threshold)
        return kept, margin_adversarial(pairs, decision, self.margin)
