"""Maps from the gradient at the image: plain, averaged over noise, integrated from black."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import captum.attr
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from classifiers.network import Network
from explainers.base import Explainer
from explainers.views import in_batches


class ClassScores:
    """What attribution explains: one score per class, for callers that index it by the target.

    The logits, or (-z, z) for a single logit z: against its partner in the pair (0, z), class 1
    leads by z and class 0 by -z.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Scores of every class; keeps the graph."""
        logits: Tensor = self.network(image)
        return torch.cat([-logits, logits], 1) if logits.shape[1] == 1 else logits


@contextmanager
def gradients_on(image: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies that a graph can be built on, whether or not the caller is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield image.detach().clone(), target.clone()


def total_magnitude(attribution: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Absolute value of the sum over channels: a grey image and its RGB copy get the same map."""
    return attribution.sum(1).abs().detach()


class Gradient(Explainer):
    """Absolute gradient of the target's score at the image.

    Args:
        network: Classifier to explain.

    Source: Simonyan et al. 2014, arXiv:1312.6034, Sec. 3, where the maximum over channels is taken
    and not the sum.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.method = captum.attr.Saliency(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Absolute gradient, summed over channels before the absolute value."""
        with gradients_on(image, target) as (free, wanted):
            return total_magnitude(self.method.attribute(free.requires_grad_(), wanted, abs=False))


class SmoothGrad(Explainer):
    """Gradient averaged, with its sign, over noisy copies of the image.

    The noise fields are drawn once per seed and are the same for every image, scaled to its own
    range: a map depends neither on its neighbours in the batch nor on last-bit differences.

    Args:
        network: Classifier to explain.
        samples: Noisy copies of each image.
        noise: Standard deviation, share of each image's range (its maximum minus its minimum).
        seed: Of the noise fields.
        work_batch: Most noisy copies that go through the network at once.

    Raises:
        ValueError: If ``samples`` or ``work_batch`` is below 1, or ``noise`` is negative.

    Source: Smilkov et al. 2017, arXiv:1706.03825, Sec. 2; as there, noisy values are not clipped.
    """

    def __init__(
        self,
        network: Network,
        samples: int = 25,
        noise: float = 0.15,
        seed: int = 0,
        work_batch: int = 64,
    ) -> None:
        if noise < 0:
            raise ValueError(f"noise must be 0 or more, but got {noise}.")
        self.network, self.noise, self.seed = network, noise, seed
        self.samples = at_least_one("samples", samples)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.Saliency(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Absolute mean gradient over the samples, summed over channels."""
        fields = noise_fields(self.samples, image, self.seed)
        copies = torch.arange(len(image) * self.samples, device=image.device)
        with gradients_on(image, target) as (free, wanted):
            sigma = self.noise * (free.amax((1, 2, 3)) - free.amin((1, 2, 3)))[:, None, None, None]
            total = torch.zeros_like(free)
            for part in torch.split(copies, self.work_batch):
                which = part // self.samples
                noisy = free[which] + sigma[which] * fields[part % self.samples]
                slope = self.method.attribute(noisy.requires_grad_(), wanted[which], abs=False)
                total.index_add_(0, which, slope)
            return total_magnitude(total / self.samples)


class IntegratedGradients(Explainer):
    """Gradient integrated along the straight line from a black image, times the image.

    Args:
        network: Classifier to explain.
        steps: Points of the Gauss-Legendre rule on the line.
        work_batch: Most points, of all images together, that go through the network at once.

    Raises:
        ValueError: If ``steps`` or ``work_batch`` is below 1.

    Source: Sundararajan et al. 2017, arXiv:1703.01365, Eq. 1; Eq. 3 sums at equal steps instead.
    """

    def __init__(self, network: Network, steps: int = 50, work_batch: int = 64) -> None:
        self.network = network
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.IntegratedGradients(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Absolute attribution, summed over channels before the absolute value."""
        with gradients_on(image, target) as (free, wanted):
            return in_batches(self._integrate, free, wanted, self.work_batch)

    def _integrate(self, image: Tensor, target: Tensor) -> Tensor:
        attribution: Tensor = self.method.attribute(
            image, target=target, n_steps=self.steps, internal_batch_size=self.work_batch
        )
        return total_magnitude(attribution)


def noise_fields(samples: int, image: Float[Tensor, "b c h w"], seed: int) -> Tensor:
    """Standard normal fields (samples, c, h, w), drawn on the CPU to be the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *image.shape[1:], generator=generator).to(image)


def at_least_one(name: str, value: int) -> int:
    """The value itself, or a ValueError where it is below 1."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, but got {value}.")
    return value
