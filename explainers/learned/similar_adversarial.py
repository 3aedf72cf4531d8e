"""What Single, Duo and the naive adversarial explainer share: their objective (Eqs. 5 to 10)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from classifiers.network import Network, decide, paired_logits
from classifiers.optimisation import Optimisation
from explainers.learned.base import Generated, OnePass, summed
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
    """Weights of the objective's terms (arXiv:2012.07332, Table I); 0 turns a term off.

    Attributes:
        similar: l_s, similar image close to the image (Eq. 6).
        adversarial: l_a, adversarial image close to the image (Eq. 6).
        pair: l_sa, the two close to each other (Eq. 6).
        classify_similar: c_s, similar image decided as before (Eq. 7, 10).
        classify_adversarial: c_a, adversarial image decided otherwise (Eq. 7, 10).
        proximity: w, the two generators' weights close to each other (Eq. 8).
        variation: t, total variation of the difference (Eq. 9).
        flipped: Share of the training images of each decided class to be decided otherwise: c_s and
            c_a are multiplied by a factor of the class that grows while fewer are, and shrinks
            while more are; 0 keeps them as they are.
        rate: Of those factors: each step adds rate * k * (flipped * n_c - f_c) / n to a logarithm,
            for n images of which n_c are decided as c and f_c of these flipped, and k classes.

    Raises:
        ValueError: If ``flipped`` is outside [0, 1).

    Source of the factors: Platt and Barr 1987, "Constrained differential optimization"; the form
    with a logarithm is this project's own.
    """

    similar: float = 1.0
    adversarial: float = 1.0
    pair: float = 0.2
    classify_similar: float = 0.01
    classify_adversarial: float = 0.01
    proximity: float = 0.001
    variation: float = 0.2
    flipped: float = 0.0
    rate: float = 0.01

    def __post_init__(self) -> None:
        """Check the user's values."""
        if not 0 <= self.flipped < 1:
            raise ValueError(
                f"flipped is the share of decisions to flip, in [0, 1), but got {self.flipped}."
            )


class SimilarAdversarial(OnePass):
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
        if self.weights.flipped:
            self.log_factor = nn.Buffer(torch.zeros(max(2, self.network.num_logits)))

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
        factor = self.log_factor.exp()[decision] if weights.flipped else None
        kept, flipped = self.classification(logits_similar, logits_adversarial, decision, factor)
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
        drawn_logits = logits_similar, logits_adversarial
        return summed(terms, (similar, adversarial), (logits, *drawn_logits))

    def after_step(self, generated: Generated) -> None:
        """Let the classification weights follow the share of flipped decisions."""
        if not self.weights.flipped:
            return
        threshold = self.network.threshold
        before, after = (
            decide(generated[name], threshold) for name in ("logits", "logits_adversarial")
        )
        lacking = self.weights.flipped - (before != after).float()
        classes = len(self.log_factor)
        mean = torch.zeros_like(self.log_factor).index_add(0, before, lacking / len(lacking))
        mean = torch.as_tensor(self.trainer.strategy.reduce(mean, reduce_op="mean"))
        self.log_factor.add_(self.weights.rate * classes * mean)
        factors = self.log_factor.exp().unbind()
        self.log_dict({f"train/factor_class{k}": factor for k, factor in enumerate(factors)})

    def classification(
        self, similar: Tensor, adversarial: Tensor, decision: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The two classification losses from the generated images' logits (Eq. 7 or 10)."""
        threshold = self.network.threshold
        if self.objective_form == "cross_entropy":
            kept = decision_loss(similar, decision, threshold, factor)
            return kept, decision_loss(adversarial, 1 - decision, threshold, factor)
        kept = margin_similar(paired_logits(similar, threshold), decision, self.margin, factor)
        pairs = paired_logits(adversarial, threshold)
        return kept, margin_adversarial(pairs, decision, self.margin, factor)
