"""The mask generator: a U-Net that draws which part of an image its class needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from classifiers.network import Network, decide
from classifiers.optimisation import Optimisation
from explainers.base import untouched
from explainers.learned.base import Generated, LearnedExplainer, summed
from explainers.learned.generators import Geometry, head
from explainers.learned.losses import squared_variation
from explainers.views import blurred


@dataclass(frozen=True)
class MaskWeights:
    """Weights of the mask generator's objective.

    Attributes:
        variation: l1, of the mean squared difference of neighbours in the mask.
        area: l2, of the mask's mean.
        destroy: l3, of what is left of the class's probability outside the mask.
        exponent: l4, the power of that probability.
    """

    variation: float = 10.0
    area: float = 3.0
    destroy: float = 5.0
    exponent: float = 0.3


class MaskGenerator(LearnedExplainer):
    """Mask m whose inside keeps the decided class and whose outside does not; the map is m.

    The image inside the mask stands for the similar one, m x + (1 - m) b, that outside it for the
    adversarial one, (1 - m) x + m b, with b a blurred image or noise.

    Args:
        network: The classifier, or the path of a checkpoint that holds it.
        conditional: Whether the U-Net is told the class; then any class can be explained, else
            only the classifier's decision.
        background: b: "blur" or "noise" (uniform, the same for all images).
        blur: Sigma of the blur, share of the image side.
        weights: Of the objective's terms.
        geometry: Of the U-Net; the mask has half its resolution.
        optimisation: Optimiser and schedule.

    Raises:
        ValueError: If the geometry's output is "delta".

    Source: Dabkowski and Gal 2017, arXiv:1705.07857, Eq. 3. Means in the place of its sums, and so
    the weight of the area, are ours; so is the class as planes of the U-Net's input.
    """

    def __init__(
        self,
        network: Network | str,
        conditional: bool = False,
        background: Literal["blur", "noise"] = "blur",
        blur: float = 10 / 224,
        weights: MaskWeights | None = None,
        geometry: Geometry | None = None,
        optimisation: Optimisation | None = None,
    ) -> None:
        super().__init__(network, geometry, optimisation)
        if self.geometry.output == "delta":
            raise ValueError("a mask is added to nothing: leave output 'delta' to the others.")
        self.conditional, self.background, self.blur = conditional, background, blur
        self.weights = weights or MaskWeights()
        self.reads_target = conditional
        self.planes = self.network.num_classes if conditional else 0
        self.unet, features = self.geometry.build(self.planes)
        self.head = head(features, 1, 1)

    def mask(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b 1 h w"]:
        """Mask in [0, 1] for the target class, at the image's size."""
        if self.planes:
            told = F.one_hot(target, self.planes).to(image)[:, :, None, None]
            image = torch.cat([image, told.expand(-1, -1, *image.shape[2:])], 1)
        half = F.avg_pool2d(self.head(self.unet(image)), 2, ceil_mode=True).sigmoid()
        return F.interpolate(half, image.shape[2:], mode="bilinear", align_corners=False)

    def mixed(
        self, image: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"]
    ) -> tuple[Tensor, Tensor]:
        """The image inside the mask and the image outside it, each over the background."""
        if self.background == "blur":
            other = blurred(image, self.blur)
        else:
            generator = torch.Generator().manual_seed(0)
            other = torch.rand(image.shape[1:], generator=generator).to(image)
        return mask * image + (1 - mask) * other, (1 - mask) * image + mask * other

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """The image inside and outside the decided class's mask, each (b, c, h, w) in [0, 1]."""
        return self.mixed(image, self.mask(image, self.network.decide(image)))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """The mask."""
        with untouched(self):
            return self.mask(image, target)[:, 0]

    def check_target(self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]) -> None:
        """Any class if the U-Net is told it, else the decision alone."""
        if not self.conditional:
            super().check_target(image, target)

    def objective(self, image: Float[Tensor, "b c h w"]) -> tuple[dict[str, Tensor], Generated]:
        """l1 TV(m) + l2 mean(m) - log p(inside) + l3 p(outside)^l4, p of the decided class."""
        weights = self.weights
        with torch.no_grad():
            logits = self.network(image)
        decision = decide(logits, self.network.threshold)
        mask = self.mask(image, decision)
        inside, outside = self.mixed(image, mask)
        logits_inside, logits_outside = self.network(torch.cat([inside, outside])).chunk(2)
        left = weights.exponent * log_probability(logits_outside, decision)
        terms = {
            "variation": weights.variation * squared_variation(mask),
            "area": weights.area * mask.mean(),
            "preserve": -log_probability(logits_inside, decision).mean(),
            "destroy": weights.destroy * left.exp().mean(),
        }
        return summed(terms, (inside, outside), (logits, logits_inside, logits_outside))

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments, without the network."""
        own = {"conditional": self.conditional, "background": self.background, "blur": self.blur}
        return {**own, "weights": asdict(self.weights), **super().arguments()}


def log_probability(
    logits: Float[Tensor, "b k"], target: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Logarithm of the target's probability, by sigmoid for a single logit, else by softmax."""
    if logits.shape[1] == 1:
        return F.logsigmoid(torch.where(target == 1, logits[:, 0], -logits[:, 0]))
    return logits.log_softmax(1).gather(1, target[:, None])[:, 0]
