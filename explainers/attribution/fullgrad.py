"""FullGrad: input times gradient, and every bias times the gradient at its layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.overrides import TorchFunctionMode

from classifiers.network import Network
from explainers.attribution.cam import upsampled
from explainers.attribution.scores import class_scores, gradients_on
from explainers.base import Explainer


class FullGrad(Explainer):
    """Input times gradient, plus every bias times the gradient at its layer's output.

    Each part is taken absolute, scaled to [0, 1] over all its channels, upsampled bilinearly to the
    image and summed over channels. The input is the backbone's, that is the normalised image; the
    biases are those of convolutions and the implicit ones of batch normalisation.

    Args:
        network: Classifier to explain.

    Source: Srinivas and Fleuret 2019, arXiv:1905.00780, Eq. 5; each layer is scaled as a whole, as
    in the authors' code. The grad-cam package scales each channel alone.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Non-negative map at the image's size."""
        parts = full_gradients(self.network, image, target)
        maps = [upsampled(to_unit_range(part.abs()).sum(1), image) for part in parts]
        return torch.stack(maps).sum(0)


def full_gradients(
    network: Network, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
) -> list[Float[Tensor, "b _ _ _"]]:
    """Input times gradient, then bias times gradient of every convolution and batch norm.

    With the biases of linear layers, which have no place, they add up to the target's score where
    the network is piecewise linear (Eq. 3).
    """
    with gradients_on(image, target) as (free, wanted):
        normalised = network.normalised(free).requires_grad_()
        with _Biases() as layers:
            scores = class_scores(network.backbone(normalised))
        score = scores.gather(1, wanted[:, None]).sum()
        slopes = torch.autograd.grad(score, [normalised, *layers.outputs])
    factors = [normalised.detach(), *layers.biases]
    return [slope * factor for slope, factor in zip(slopes, factors, strict=True)]


class _Biases(TorchFunctionMode):
    """Keeps the outputs and the biases of convolutions and batch norms that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.biases: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        output = func(*args, **options)
        name = getattr(func, "__name__", "")
        if name == "batch_norm" and output.ndim == 4:
            zero = args[0].new_zeros(1, args[0].shape[1], 1, 1)
            bias = func(zero, *args[1:], **options)[0]
        elif (
            name == "conv2d" and (given := options.get("bias", (*args, None, None)[2])) is not None
        ):
            bias = given[:, None, None]
        else:
            return output
        self.outputs.append(output)
        self.biases.append(bias.detach())
        return output.clone()  # what follows in place must not overwrite the kept output


def to_unit_range(values: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """Values of each image scaled to [0, 1]; 0 where they are all the same."""
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return (values - low) / (high - low).where(high > low, torch.ones_like(high))
