"""SyCE and CyCE: a generator and a discriminator for each class, and cycles through both."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from classifiers.network import Network, decide
from classifiers.optimisation import Optimisation
from explainers.base import untouched
from explainers.learned.base import Generated, LearnedExplainer, summed
from explainers.learned.generators import Geometry
from explainers.learned.losses import decision_loss, distance


@dataclass(frozen=True)
class CycleWeights:
    """Weights of the terms of SyCE and CyCE; 0 turns a term off.

    Attributes:
        symmetry: Stable image close to the image.
        cycle: Cycled image close to what it comes back to.
        classify_adversarial: Adversarial image decided otherwise.
        classify_stable: Stable image decided as before.
        classify_cycle: Cycled image decided as what it comes back to.
        adversary: Of the discriminators' scores.
        penalty: Of the discriminators' gradients.
    """

    symmetry: float = 10.0
    cycle: float = 2.0
    classify_adversarial: float = 0.2
    classify_stable: float = 0.01
    classify_cycle: float = 0.005
    adversary: float = 0.25
    penalty: float = 1.0


class Conditional(LearnedExplainer):
    """A generator g_c into each class c of a binary classifier, and its Wasserstein discriminator.

    For an image x decided c, the adversarial image is x_a = g_{1-c}(x). The discriminator of a
    class tells images that the classifier decides so from those that its generator drew; it takes
    one step, with a gradient penalty, for each of the generators'.

    Args:
        network: The classifier, or the path of a checkpoint that holds it; of two classes.
        weights: Of the objective's terms.
        geometry: Of each generator.
        optimisation: Optimiser and schedule of the generators; the discriminators' rate is the
            same, their schedule constant.
        discriminator: Channels of the discriminators' levels.

    Raises:
        ValueError: If the classifier has more than two classes.

    Source: Charachon et al. 2021, arXiv:2106.10947; the text of its formulas is not at hand, how
    the images are put together is a reading of what is said about it.
    """

    default = CycleWeights()

    def __init__(
        self,
        network: Network | str,
        weights: CycleWeights | None = None,
        geometry: Geometry | None = None,
        optimisation: Optimisation | None = None,
        discriminator: tuple[int, ...] = (32, 64, 96),
    ) -> None:
        super().__init__(network, geometry, optimisation)
        if self.network.num_logits > 1:
            raise ValueError(
                f"{type(self).__name__} needs a one-logit network, this one has "
                f"{self.network.num_logits} logits; use Single, Duo or MaskGenerator."
            )
        self.weights, self.levels = weights or self.default, tuple(discriminator)
        channels = self.geometry.channels
        self.generators = nn.ModuleList()
        for _ in range(2):
            unet, features = self.geometry.build()
            self.generators.append(nn.Sequential(unet, self.geometry.head(features)))
        self.discriminators = nn.ModuleList(critic(channels, self.levels) for _ in range(2))
        self.automatic_optimization = False

    def into(
        self, image: Float[Tensor, "b c h w"], wanted: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Images translated into the wanted classes, each by that class's generator."""
        drawn = torch.empty_like(image)
        for label, generator in enumerate(self.generators):
            chosen = (wanted == label).nonzero()[:, 0]
            if len(chosen):
                part = image[chosen]
                drawn = drawn.index_copy(0, chosen, self.geometry.draw(generator(part), part))
        return drawn

    @abstractmethod
    def explained(self, image: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
        """The two images whose difference explains the decision."""

    @abstractmethod
    def terms(
        self, image: Tensor, decision: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weighted terms; the two images that explain; the logits of each."""

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Similar and adversarial image, each (b, c, h, w) in [0, 1]."""
        return self.explained(image, self.network.decide(image))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Absolute difference of the two images, mean over the channels."""
        with untouched(self):
            first, second = self.explained(image, target)
        return (first - second).abs().mean(1)

    def objective(self, image: Float[Tensor, "b c h w"]) -> tuple[dict[str, Tensor], Generated]:
        """The generators' weighted terms with their sum, and the generated images."""
        with torch.no_grad():
            logits = self.network(image)
        decision = decide(logits, self.network.threshold)
        terms, images, drawn_logits = self.terms(image, decision)
        score = self.judged(images[1], 1 - decision)
        terms["adversary"] = -self.weights.adversary * score.mean()
        return summed(terms, images, (logits, *drawn_logits))

    def judged(
        self, image: Float[Tensor, "b c h w"], label: Int64[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Score of each image by its class's discriminator, larger = more like a real one."""
        scores = torch.stack([judge(image) for judge in self.discriminators], 1)
        return scores.gather(1, label[:, None])[:, 0]

    def decided(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy between the classifier's score and a wanted decision."""
        return decision_loss(logits, label, self.network.threshold)

    def discriminate(self, image: Tensor, drawn: Tensor, decision: Tensor) -> Tensor:
        """Wasserstein loss of each discriminator with its gradient penalty, added.

        A class of which the batch has no real image, or no drawn one, does not count.

        Args:
            image: Real images; each counts for the class it is decided as.
            drawn: Their adversarial images, for the other class.
            decision: Of the real images.
        """
        loss = torch.zeros((), device=image.device, requires_grad=True)
        for label, judge in enumerate(self.discriminators):
            count = min(int((decision == label).sum()), int((decision != label).sum()))
            if not count:
                continue
            real, fake = image[decision == label][:count], drawn[decision != label][:count]
            share = torch.rand(count, 1, 1, 1).to(image)
            between = (share * real + (1 - share) * fake).requires_grad_()
            slope = torch.autograd.grad(judge(between).sum(), between, create_graph=True)[0]
            norm = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            penalty = self.weights.penalty * (norm - 1).square().mean()
            loss = loss + judge(fake).mean() - judge(real).mean() + penalty
        return loss

    def configure_optimizers(self) -> list[Any]:  # type: ignore[override]
        """Adam and its schedule over the generators, Adam over the discriminators."""
        adam = torch.optim.Adam(self.discriminators.parameters(), self.optimisation.learning_rate)
        own: Any = self.optimisation.configure(self.generators.parameters(), self.trainer)
        schedule = own["lr_scheduler"]["scheduler"]
        return [{"optimizer": own["optimizer"], "lr_scheduler": schedule}, {"optimizer": adam}]

    def on_train_epoch_end(self) -> None:
        """Move the schedules that go by epochs; Lightning leaves them alone here."""
        schedule: Any = self.lr_schedulers()
        if self.optimisation.schedule == "plateau":
            schedule.step(self.trainer.callback_metrics[self.optimisation.monitor])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        """One step of the generators, then one of the discriminators."""
        image = batch["image"]
        optimizers: Any = self.optimizers()
        generators, discriminators = optimizers
        self.toggle_optimizer(generators)
        terms, generated = self.objective(image)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        generators.zero_grad()
        self.manual_backward(terms["loss"])
        generators.step()
        self.untoggle_optimizer(generators)
        if self.optimisation.schedule in ("one_cycle", "cosine"):
            schedule: Any = self.lr_schedulers()
            schedule.step()
        self.toggle_optimizer(discriminators)
        decision = decide(generated["logits"], self.network.threshold)
        loss = self.discriminate(image, generated["adversarial"].detach(), decision)
        discriminators.zero_grad()
        self.manual_backward(loss)
        discriminators.step()
        self.untoggle_optimizer(discriminators)
        self.log("train/discriminator", loss)

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network."""
        own = {"weights": asdict(self.weights), "discriminator": list(self.levels)}
        return {**own, **super().arguments()}


class SyCE(Conditional):
    """The stable image, drawn back from the adversarial one, stands for the similar one.

    Stable: x_s = g_c(x_a), close to x and decided c; cycled: g_{1-c}(x_s), close to x_a. The
    explanation is abs(x_s - x_a).

    Args, Raises, Source: as `Conditional`.
    """

    def explained(self, image: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
        """Stable and adversarial image."""
        adversarial = self.into(image, 1 - decision)
        return self.into(adversarial, decision), adversarial

    def terms(
        self, image: Tensor, decision: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Symmetry, cycle and the three classifications."""
        weights, other = self.weights, 1 - decision
        stable, adversarial = self.explained(image, decision)
        cycled = self.into(stable, other)
        both = self.network(torch.cat([stable, adversarial, cycled]))
        kept, flipped, again = both.chunk(3)
        terms = {
            "symmetry": weights.symmetry * distance(image, stable),
            "cycle": weights.cycle * distance(adversarial, cycled),
            "classify_adversarial": weights.classify_adversarial * self.decided(flipped, other),
            "classify_stable": weights.classify_stable * self.decided(kept, decision),
            "classify_cycle": weights.classify_cycle * self.decided(again, other),
        }
        return terms, (stable, adversarial), (kept, flipped)


class CyCE(Conditional):
    """The image itself stands for the similar one; only the cycle ties the generators together.

    Cycled: g_c(x_a), close to x and decided c. The explanation is abs(x - x_a).

    Args, Raises, Source: as `Conditional`.
    """

    default = CycleWeights(symmetry=0, cycle=10, classify_stable=0)

    def explained(self, image: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
        """The image and its adversarial image."""
        return image, self.into(image, 1 - decision)

    def terms(
        self, image: Tensor, decision: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cycle and two classifications."""
        weights, other = self.weights, 1 - decision
        adversarial = self.into(image, other)
        cycled = self.into(adversarial, decision)
        unchanged, flipped, again = self.network(torch.cat([image, adversarial, cycled])).chunk(3)
        terms = {
            "cycle": weights.cycle * distance(image, cycled),
            "classify_adversarial": weights.classify_adversarial * self.decided(flipped, other),
            "classify_cycle": weights.classify_cycle * self.decided(again, decision),
        }
        return terms, (image, adversarial), (unchanged, flipped)


def critic(channels: int, levels: tuple[int, ...]) -> nn.Sequential:
    """A convolution and a strided one a level, LeakyReLU, then the mean of one logit's map."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((channels, *levels)):
        for source, stride in ((inputs, 1), (outputs, 2)):
            layers += [nn.Conv2d(source, outputs, 3, stride, 1), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(levels[-1], 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)]
    return nn.Sequential(*layers)
