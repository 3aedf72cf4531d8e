"""Maps that never look at the classifier: what every explainer must beat."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TypedDict

import torch
from jaxtyping import Float, Int64
from kornia.filters import sobel
from torch import Tensor
from torch.signal.windows import gaussian

from classifiers.network import Network
from explainers.base import Explainer
from explainers.views import smooth


class Masked(TypedDict):
    """The part of a batch that holds the annotation.

    mask: Bool (b, h, w), True inside the evidence.
    has_mask: Bool (b,), whether the image is annotated.
    """

    mask: Tensor
    has_mask: Tensor


class RandomMap(Explainer):
    """Uniform noise in [0, 1), drawn from a seed per image: its content, in 8 bits.

    Args:
        network: Has no influence.
        seed: Another seed gives every image another map.
    """

    reads_target = False

    def __init__(self, network: Network, seed: int = 0) -> None:
        self.network, self.seed = network, seed

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """One draw per image, the same on any device and in any batch."""
        content = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
        seeds = [zlib.crc32(one.tobytes(), self.seed) for one in content]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        maps = [torch.rand(*image.shape[2:], generator=generator) for generator in draws]
        return torch.stack(maps).to(image)


class CentredGaussian(Explainer):
    """The same bell at the centre of every image, 1 at its peak.

    Args:
        network: Has no influence.
        sigma: Standard deviation along each axis, as a share of the side.

    Raises:
        ValueError: If ``sigma`` is not positive.
    """

    reads_target = False

    def __init__(self, network: Network, sigma: float = 0.25) -> None:
        if sigma <= 0:
            raise ValueError(f"sigma must be above 0, but got {sigma}.")
        self.network, self.sigma = network, sigma

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Product of a Gaussian along each axis."""
        rows, columns = (gaussian(n, std=self.sigma * n) for n in image.shape[2:])
        return torch.outer(rows, columns).to(image).repeat(len(image), 1, 1)


class MeanMask(Explainer):
    """The mean mask of the training images, the same for every image.

    Args:
        network: Has no influence.
        mask: Share of the training masks that hold each pixel (h, w), from `mean_mask`.
    """

    reads_target = False

    def __init__(self, network: Network, mask: Float[Tensor, "h w"]) -> None:
        self.network, self.mask = network, mask

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """The mask, once per image.

        Raises:
            ValueError: If the images have another size than the mask.
        """
        if image.shape[2:] != self.mask.shape:
            raise ValueError(
                f"the mean mask has size {tuple(self.mask.shape)}, but the images have "
                f"{tuple(image.shape[2:])}; compute it at the images' size."
            )
        return self.mask.to(image).repeat(len(image), 1, 1)


class EdgeMap(Explainer):
    """Magnitude of the Sobel gradient of the image's grey values, blurred.

    Args:
        network: Has no influence.
        blur: Sigma of the Gaussian as a share of the image's shorter side; 0 is off.

    Raises:
        ValueError: If ``blur`` is outside [0, 0.3], at the first image.
    """

    reads_target = False

    def __init__(self, network: Network, blur: float = 0.02) -> None:
        self.network, self.blur = network, blur

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Kornia's normalised Sobel filter; 1e-3 where the image is constant."""
        return smooth(sobel(image.mean(1, keepdim=True))[:, 0], self.blur)


def mean_mask(batches: Iterable[Masked]) -> Float[Tensor, "h w"]:
    """Share of the annotated images whose mask holds each pixel, in [0, 1].

    Args:
        batches: Of the training split, all of one size; images without annotation do not count.

    Raises:
        ValueError: If no image is annotated.
    """
    masks = [batch["mask"][batch["has_mask"]] for batch in batches]
    count = sum(len(mask) for mask in masks)
    if count == 0:
        raise ValueError("the mean mask needs at least one annotated training image, but got none.")
    return torch.stack([mask.sum(0) for mask in masks]).sum(0) / count
