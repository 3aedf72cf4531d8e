"""Maps from the gradient at the image: plain, averaged over noise, integrated from black."""

from __future__ import annotations

import captum.attr
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from classifiers.network import Network
from explainers.attribution.scores import ClassScores, Sign, at_least_one, gradients_on, signed
from explainers.base import Explainer
from explainers.batches import halving, in_parts


class Gradient(Explainer):
    """Gradient of the target's score at the image.

    Args:
        network: Classifier to explain.
        sign: Which attributions count, see `signed`.

    Source: Simonyan et al. 2014, arXiv:1312.6034, Sec. 3, where the maximum over channels is taken
    and not the sum.
    """

    def __init__(self, network: Network, sign: Sign = "absolute") -> None:
        self.network, self.sign = network, sign
        self.method = captum.attr.Saliency(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Gradient, summed over channels."""
        with gradients_on(image, target) as (free, wanted):
            slope = self.method.attribute(free.requires_grad_(), wanted, abs=False)
            return signed(slope, self.sign)


class InputXGradient(Explainer):
    """Gradient of the target's score at the image, times the image.

    Args:
        network: Classifier to explain.
        sign: Which attributions count, see `signed`.

    Source: Shrikumar et al. 2016, arXiv:1605.01713, Sec. 3; the image is the one in [0, 1].
    """

    def __init__(self, network: Network, sign: Sign = "absolute") -> None:
        self.network, self.sign = network, sign
        self.method = captum.attr.InputXGradient(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Product, summed over channels."""
        with gradients_on(image, target) as (free, wanted):
            return signed(self.method.attribute(free.requires_grad_(), wanted), self.sign)


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
        sign: Which attributions count, see `signed`.

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
        sign: Sign = "absolute",
    ) -> None:
        if noise < 0:
            raise ValueError(f"noise must be 0 or more, but got {noise}.")
        self.network, self.noise, self.seed, self.sign = network, noise, seed, sign
        self.samples = at_least_one("samples", samples)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.Saliency(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Mean attribution over the samples, summed over channels."""
        fields = noise_fields(self.samples, image, self.seed)
        with gradients_on(image, target) as (free, wanted):
            sigma = self.noise * (free.amax((1, 2, 3)) - free.amin((1, 2, 3)))[:, None, None, None]
            total = torch.zeros_like(free)

            def add(copies: Tensor) -> None:
                which, sample = copies // self.samples, copies % self.samples
                noisy = free[which] + sigma[which] * fields[sample]
                total.index_add_(0, which, self.attribution(noisy, wanted[which], sample))

            in_parts(add, len(image) * self.samples, self.work_batch, image.device)
            return signed(total / self.samples, self.sign)

    def attribution(
        self, noisy: Float[Tensor, "n c h w"], target: Int64[Tensor, " n"], sample: Tensor
    ) -> Float[Tensor, "n c h w"]:
        """Attribution of noisy copies; ``sample`` is the number of each copy's noise field."""
        slope: Tensor = self.method.attribute(noisy.requires_grad_(), target, abs=False)
        return slope.detach()


class GradientSHAP(SmoothGrad):
    """Expected gradients: at a random point between black and each noisy copy, times the copy.

    Args:
        network: Classifier to explain.
        samples: Noisy copies of each image, one point on its line each.
        noise: Standard deviation, share of each image's range.
        seed: Of the noise fields and of the points, which are the same for every image.
        work_batch: Most noisy copies that go through the network at once.
        sign: Which attributions count, see `signed`.

    Raises:
        ValueError: As `SmoothGrad`.

    Source: Lundberg and Lee 2017, arXiv:1705.07874; as captum's GradientShap, with a black image as
    the only baseline.
    """

    def attribution(
        self, noisy: Float[Tensor, "n c h w"], target: Int64[Tensor, " n"], sample: Tensor
    ) -> Float[Tensor, "n c h w"]:
        """Gradient at the points, times the difference from black."""
        generator = torch.Generator().manual_seed(self.seed)
        share = torch.rand(self.samples, generator=generator).to(noisy)[sample, None, None, None]
        return super().attribution(share * noisy, target, sample) * noisy


class SmoothGradIG(SmoothGrad):
    """Integrated Gradients averaged, with its sign, over noisy copies of the image.

    Args:
        network: Classifier to explain.
        samples: Noisy copies of each image.
        steps: Points of the Gauss-Legendre rule on the line from black to each copy.
        noise: Standard deviation, share of each image's range.
        seed: Of the noise fields.
        work_batch: Most points, of all copies together, that go through the network at once.
        sign: Which attributions count, see `signed`.

    Raises:
        ValueError: As `SmoothGrad`, and if ``steps`` is below 1.

    Source: Smilkov et al. 2017, arXiv:1706.03825, Sec. 2; Sundararajan et al. 2017, Eq. 1.
    """

    def __init__(
        self,
        network: Network,
        samples: int = 25,
        steps: int = 50,
        noise: float = 0.15,
        seed: int = 0,
        work_batch: int = 64,
        sign: Sign = "absolute",
    ) -> None:
        super().__init__(network, samples, noise, seed, work_batch, sign)
        self.steps = at_least_one("steps", steps)
        self.integral = captum.attr.IntegratedGradients(ClassScores(network))

    def attribution(
        self, noisy: Float[Tensor, "n c h w"], target: Int64[Tensor, " n"], sample: Tensor
    ) -> Float[Tensor, "n c h w"]:
        """Integrated gradients of the copies."""
        return integrated(self.integral, noisy, target, self.steps, self.work_batch)


class IntegratedGradients(Explainer):
    """Gradient integrated along the straight line from a black image, times the image.

    Args:
        network: Classifier to explain.
        steps: Points of the Gauss-Legendre rule on the line.
        work_batch: Most points, of all images together, that go through the network at once.
        sign: Which attributions count, see `signed`.

    Raises:
        ValueError: If ``steps`` or ``work_batch`` is below 1.

    Source: Sundararajan et al. 2017, arXiv:1703.01365, Eq. 1; Eq. 3 sums at equal steps instead.
    """

    def __init__(
        self, network: Network, steps: int = 50, work_batch: int = 64, sign: Sign = "absolute"
    ) -> None:
        self.network, self.sign = network, sign
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.IntegratedGradients(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Attribution, summed over channels."""
        with gradients_on(image, target) as (free, wanted):
            attribution = integrated(self.method, free, wanted, self.steps, self.work_batch)
            return signed(attribution, self.sign)


def integrated(
    method: captum.attr.IntegratedGradients,
    image: Float[Tensor, "b c h w"],
    target: Int64[Tensor, " b"],
    steps: int,
    work_batch: int,
    baseline: float = 0.0,
) -> Float[Tensor, "b c h w"]:
    """Gradient integrated from a grey value to the image, times the difference of the two.

    At most ``work_batch`` points of all images together go through the network at once.
    """

    def run(points: int) -> Tensor:
        pairs = zip(torch.split(image, points), torch.split(target, points), strict=True)
        parts = [
            method.attribute(x, baseline, k, n_steps=steps, internal_batch_size=points)
            for x, k in pairs
        ]
        return torch.cat(parts).detach().to(image)

    return halving(run, work_batch)


def noise_fields(samples: int, image: Float[Tensor, "b c h w"], seed: int) -> Tensor:
    """Standard normal fields (samples, c, h, w), drawn on the CPU to be the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *image.shape[1:], generator=generator).to(image)
