"""What all learned explainers share: objective, training, checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float, Int64
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from classifiers.network import Network, check_classes, decide, load_network, paired_logits
from classifiers.optimisation import Optimisation
from explainers.base import Explainer, untouched
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


class Generated(TypedDict):
    """What a step gives to callbacks: images (b, c, h, w) and logits (b, k) of one batch."""

    loss: Tensor
    similar: Tensor
    adversarial: Tensor
    logits: Tensor
    logits_similar: Tensor
    logits_adversarial: Tensor


class LearnedExplainer(LightningModule, Explainer):
    """Generators of a similar and an adversarial image; their absolute difference explains.

    Trained on the frozen classifier's own decisions; no annotation is needed. A subclass builds
    its generators and gives ``forward``.

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
        super().__init__()
        self.network = load_network(network) if isinstance(network, str) else network
        self.network.eval().requires_grad_(False)
        self.weights, self.geometry = weights or Weights(), geometry or Geometry()
        self.optimisation = optimisation or Optimisation()
        if objective == "cross_entropy" and self.network.num_logits > 1:
            raise ValueError(
                f"objective 'cross_entropy' needs a one-logit network, this one has "
                f"{self.network.num_logits} logits; use 'margin'."
            )
        one = self.network.num_logits == 1
        automatic = "cross_entropy" if one else "margin"
        self.objective_form = automatic if objective == "auto" else objective
        self.margin = margin

    @abstractmethod
    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Similar and adversarial image, each (b, c, h, w) in [0, 1]."""

    def paired_weights(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Trainable weights that L_G (Eq. 8) compares, in the same order; none by default."""
        return (), ()

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network, that rebuild this explainer."""
        return {
            "weights": asdict(self.weights),
            "geometry": asdict(self.geometry) | {"widths": list(self.geometry.widths)},
            "optimisation": asdict(self.optimisation),
            "objective": self.objective_form,
            "margin": self.margin,
        }

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """E(x) = abs(g_s(x) - g_a(x)), mean over the channels (Eq. 3)."""
        with untouched(self):
            similar, adversarial = self(image)
        difference: Tensor = similar - adversarial
        return difference.abs().mean(1)

    def check_target(self, target: Int64[Tensor, " b"], decision: Int64[Tensor, " b"]) -> None:
        """A learned explainer explains the classifier's decision and no other class.

        Raises:
            ValueError: If a target differs from the decision.
        """
        wrong = (target != decision).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"{type(self).__name__} explains the classifier's own decision: image {first} is "
                f"decided as class {int(decision[first])}, but target {int(target[first])} was "
                "asked for; leave target out or use another explainer."
            )

    def train(self, mode: bool = True) -> LearnedExplainer:
        """Set the generators' mode; the classifier stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compare the classifier and the generators with the data."""
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", self.network.class_names)
        check_classes(self.network.class_names, names)
        channels = getattr(getattr(data, "loading", None), "channels", self.geometry.channels)
        if channels != self.geometry.channels:
            raise ValueError(
                f"the images have {channels} channels, but geometry.channels is "
                f"{self.geometry.channels}; make them equal."
            )

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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Objective of one batch; the labels and masks are not looked at."""
        terms, _ = self.objective(batch["image"])
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Generated:
        """Objective and generated images of one batch, for the callbacks."""
        return self._evaluate(batch["image"], "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Generated:
        """Objective and generated images of one batch, for the callbacks."""
        return self._evaluate(batch["image"], "test")

    def _evaluate(self, image: Tensor, stage: str) -> Generated:
        terms, generated = self.objective(image)
        logged = {f"{stage}/{name}": value for name, value in terms.items()}
        size: Any = float(len(image))  # gloo rounds a mean of whole numbers down
        self.log_dict(logged, batch_size=size, sync_dist=True)
        return generated

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam and its schedule over the generators' weights."""
        return self.optimisation.configure(self.parameters(), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint complete by itself: the classifier's recipe, this one's arguments."""
        checkpoint["network"] = dict(self.network.recipe)
        checkpoint["explainer"] = {"class": type(self).__name__, "arguments": self.arguments()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the operating point that belongs to the checkpoint's classifier."""
        self.network.set_threshold(checkpoint["network"]["threshold"])
