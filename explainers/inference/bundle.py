"""Classifier and generator as one module of fixed image size, without anything to look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from classifiers.network import Network, decide, probabilities
from explainers.views import Views, laid_out, smooth

T = TypeVar("T")


class Answer(NamedTuple):
    """What a bundle says of a batch.

    Attributes:
        probability: Of every class, Float (b, classes).
        decision: Class at the operating point, Int64 (b).
        similar: Image that is decided as before, Float (b, c, h, w) in [0, 1].
        adversarial: Image that is decided otherwise, Float (b, c, h, w) in [0, 1].
        map: Float (b, h, w), larger = more relevant.
    """

    probability: Tensor
    decision: Tensor
    similar: Tensor
    adversarial: Tensor
    map: Tensor


class Explanation(NamedTuple):
    """An `Answer` without its images."""

    probability: Tensor
    decision: Tensor
    map: Tensor


OUTPUTS = Answer._fields


@runtime_checkable
class Generator(Protocol):
    """What a bundle asks of a learned explainer."""

    def eval(self) -> Generator:
        """Itself, in eval mode."""

    def drawn(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similar and adversarial image (b, c, h, w), and the map (b, h, w)."""

    def plain(self, image: Tensor) -> Tensor:
        """The map alone."""


class Bundle(nn.Module):
    """Images in [0, 1] in, an `Answer` out: normalisation, classifier, generator, views, smoothing.

    The maps are those of `Explainer.explain` for images of this size.

    Args:
        network: The classifier.
        generator: Module that gives the similar and the adversarial image and the map of an image.
        size: Height and width of the images, pixels.
        views: Geometric views to average over, all in one batch; none by default.
        smoothing: Sigma of a Gaussian over the map, share of the image side; 0 is off.
    """

    there: Tensor
    back: Tensor
    seen: Tensor

    def __init__(
        self,
        network: Network,
        generator: Generator,
        size: tuple[int, int],
        views: Views | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.generator = network.eval(), generator.eval()
        self.smoothing, self.count = smoothing, views.count if views else 0
        if views and views.count:
            forward, back, seen = laid_out(views, *size)
            self.register_buffer("there", sampling_grid(back, *size))
            self.register_buffer("back", sampling_grid(forward, *size))
            self.register_buffer("seen", seen.float())

    def forward(
        self, image: Float[Tensor, "b c h w"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields of an `Answer`, as a plain tuple that a file can hold."""
        (similar, adversarial, plain), logits = self.with_logits(self.generator.drawn, image)
        probability, decision, maps = self.judged(image, plain, logits)
        return probability, decision, similar, adversarial, maps

    def explained(self, image: Float[Tensor, "b c h w"]) -> Explanation:
        """An answer without its images, which may take longer to draw than the map."""
        return Explanation(*self.judged(image, *self.with_logits(self.generator.plain, image)))

    def with_logits(
        self, draw: Callable[[Tensor], T], image: Float[Tensor, "b c h w"]
    ) -> tuple[T, Float[Tensor, "b k"]]:
        """What is drawn from an image, and its logits: of the pass that drawing makes, if any."""
        found: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            if inputs[0] is image:
                found.append(logits)

        handle = self.network.register_forward_hook(keep)
        try:
            drawn = draw(image)
        finally:
            handle.remove()
        return drawn, found[0] if found else self.network(image)

    def judged(
        self,
        image: Float[Tensor, "b c h w"],
        plain: Float[Tensor, "b h w"],
        logits: Float[Tensor, "b k"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probability, decision, and the map averaged and smoothed."""
        maps = self.averaged(image, plain) if self.count else plain
        decision = decide(logits, self.network.threshold)
        return probabilities(logits), decision, smooth(maps, self.smoothing)

    def averaged(
        self, image: Float[Tensor, "b c h w"], plain: Float[Tensor, "b h w"]
    ) -> Float[Tensor, "b h w"]:
        """Maps averaged over the views (Eq. 11), plain where no view saw a pixel."""
        batch = image.shape[0]
        views = image.repeat_interleave(self.count, 0)
        moved = sampled(views, self.there.repeat(batch, 1, 1, 1), "border")
        maps = self.generator.plain(moved)[:, None]
        maps = sampled(maps, self.back.repeat(batch, 1, 1, 1), "zeros")[:, 0]
        total = (maps.unflatten(0, (batch, self.count)) * self.seen).sum(1)
        times = self.seen.sum(0)
        return torch.where(times > 0, total / times.clamp(min=1), plain)


def sampled(
    image: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h w 2"], padding: str
) -> Float[Tensor, "b c h w"]:
    """The image at the grid's places, bilinear."""
    return grid_sample(image, grid, "bilinear", padding, align_corners=True)


def sampling_grid(
    matrices: Float[Tensor, "k 2 3"], height: int, width: int
) -> Float[Tensor, "k h w 2"]:
    """Where each pixel's value comes from, in [-1, 1], for transforms of pixel coordinates."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], -1).to(matrices)
    places = torch.einsum("kij,hwj->khwi", matrices, pixels)
    return 2 * places / torch.tensor([width - 1, height - 1]).to(matrices) - 1
