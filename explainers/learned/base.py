"""What all learned explainers share: objective, training, checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, TypedDict

import torch
from jaxtyping import Float, Int64
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from classifiers.network import Network, check_classes, load_network
from classifiers.optimisation import Optimisation, check_plan
from explainers.base import Explainer, untouched
from explainers.learned.generators import Geometry


class Generated(TypedDict):
    """What a step gives to callbacks: images (b, c, h, w) and logits (b, k) of one batch."""

    loss: Tensor
    similar: Tensor
    adversarial: Tensor
    logits: Tensor
    logits_similar: Tensor
    logits_adversarial: Tensor


def summed(
    terms: dict[str, Tensor], images: Sequence[Tensor], logits: Sequence[Tensor]
) -> tuple[dict[str, Tensor], Generated]:
    """What an objective gives: its terms with their sum as "loss", and what was generated.

    Args:
        terms: Weighted, by name.
        images: Similar and adversarial, each (b, c, h, w).
        logits: Of the image, the similar and the adversarial one, each (b, k).
    """
    terms["loss"] = torch.stack(list(terms.values())).sum()
    return terms, {
        "loss": terms["loss"],
        "similar": images[0],
        "adversarial": images[1],
        "logits": logits[0],
        "logits_similar": logits[1],
        "logits_adversarial": logits[2],
    }


class LearnedExplainer(LightningModule, Explainer):
    """Generators of a similar and an adversarial image, trained on the classifier's own decisions.

    The classifier stays frozen; no annotation is needed. A subclass builds its generators and gives
    ``forward`` and ``objective``.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        geometry: Of the generators.
        optimisation: Optimiser and schedule.

    Raises:
        ValueError: If the data does not fit the network or the geometry.
    """

    abnormal_per_normal = 1  # in an epoch, at least: normal images flip blindly and would rule

    def __init__(
        self,
        network: Network | str,
        geometry: Geometry | None = None,
        optimisation: Optimisation | None = None,
    ) -> None:
        super().__init__()
        self.network = load_network(network) if isinstance(network, str) else network
        self.network.eval().requires_grad_(False)
        self.geometry = geometry or Geometry()
        given = optimisation or Optimisation()
        if given.abnormal_per_normal is None:
            given = replace(given, abnormal_per_normal=self.abnormal_per_normal)
        self.optimisation = given

    @abstractmethod
    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Similar and adversarial image, each (b, c, h, w) in [0, 1]."""

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network, that rebuild this explainer."""
        return {
            "geometry": asdict(self.geometry) | {"widths": list(self.geometry.widths)},
            "optimisation": asdict(self.optimisation),
        }

    def description(self) -> dict[str, Any]:
        """Name of the class and `arguments`."""
        return {"class": type(self).__name__, "arguments": self.arguments()}

    @abstractmethod
    def objective(self, image: Float[Tensor, "b c h w"]) -> tuple[dict[str, Tensor], Generated]:
        """Weighted terms by name, their sum as "loss" among them, and the generated images."""

    def check_target(self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]) -> None:
        """A learned explainer explains the classifier's decision and no other class.

        Raises:
            ValueError: If a target differs from the decision.
        """
        decision = self.network.decide(image)
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
                f"{self.geometry.channels}: set model.geometry.channels to {channels}."
            )

    def on_train_start(self) -> None:
        """Check that a resumed schedule reaches to the end."""
        check_plan(self.trainer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Objective of one batch; the labels and masks are not looked at."""
        terms, generated = self.batch_objective(batch)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        self.after_step(generated)
        return terms["loss"]

    def after_step(self, generated: Generated) -> None:
        """What else a step changes, seen from the images it generated."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Generated:
        """Objective and generated images of one batch, for the callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Generated:
        """Objective and generated images of one batch, for the callbacks."""
        return self._evaluate(batch, "test")

    def batch_objective(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Generated]:
        """`objective` of a batch."""
        return self.objective(batch["image"])

    def _evaluate(self, batch: dict[str, Any], stage: str) -> Generated:
        terms, generated = self.batch_objective(batch)
        logged = {f"{stage}/{name}": value for name, value in terms.items()}
        size: Any = float(len(batch["image"]))  # gloo rounds a mean of whole numbers down
        self.log_dict(logged, batch_size=size, sync_dist=True)
        return generated

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam and its schedule over the generators' weights."""
        return self.optimisation.configure(self.parameters(), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint complete by itself: the classifier's recipe, this one's arguments."""
        checkpoint["network"] = dict(self.network.recipe)
        checkpoint["explainer"] = self.description()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the operating point that belongs to the checkpoint's classifier."""
        self.network.set_threshold(checkpoint["network"]["threshold"])


class OnePass(LearnedExplainer):
    """An explainer whose map is one pass of its own, the same for every class."""

    reads_target = False
    abnormal_per_normal = 4  # better maps, but normal images stay as they are (benchmarks/LOG.md)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """The map of `plain`."""
        with untouched(self):
            return self.plain(image)

    def drawn(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Both images, and E(x) = abs(g_s(x) - g_a(x)), mean over the channels (Eq. 3)."""
        similar, adversarial = self(image)
        return similar, adversarial, (similar - adversarial).abs().mean(1)

    def plain(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
        """The map of `drawn` alone."""
        return self.drawn(image)[2]
