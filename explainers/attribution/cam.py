"""Grad-CAM at any layer of the backbone."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial

import torch
import torchcam.methods
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import interpolate

from classifiers.network import Network
from explainers.attribution.gradient import ClassScores, gradients_on
from explainers.base import Explainer

POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class GradCAM(Explainer):
    """Activations of a layer, weighted by the mean gradient of the target's score, then ReLU.

    Raw values, upsampled bilinearly to the image. Where the network overwrites the layer's output
    in place (VGG's convolutions, the last norm of DenseNet: an in-place ReLU follows), the layer
    stands for what is left of it.

    Args:
        network: Classifier to explain.
        layer: Dotted name inside ``network.backbone`` ("layer2", "blocks.3", "features.12"), of a
            layer with output (b, channels, height, width). By default the last one before pooling,
            found on the first image of each call.

    Raises:
        ValueError: If the backbone has no such layer.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, Eqs. 1, 2.
    """

    def __init__(self, network: Network, layer: str | None = None) -> None:
        names = [name for name, _ in network.backbone.named_modules() if name]
        if layer is not None and layer not in names:
            near = get_close_matches(layer, names) or names[:5]
            raise ValueError(f"the backbone has no layer {layer!r}; near matches: {near}.")
        self.network, self.layer = network, layer
        self.scores = ClassScores(network)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Non-negative map at the image's size.

        Raises:
            ValueError: If the layer's output is not (b, channels, height, width).
        """
        layer = self.layer or last_spatial_layer(self.network, image[:1])
        with (
            gradients_on(image, target) as (free, wanted),
            torchcam.methods.GradCAM(self.network.backbone, layer) as extractor,
        ):
            scores = self.scores(free.requires_grad_())
            check_spatial(layer, extractor.hook_a[0])
            maps = extractor(wanted.tolist(), scores, normalized=False)[0]
        size = (image.shape[2], image.shape[3])
        return interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def check_spatial(layer: str, activation: Tensor | None) -> None:
    """Raise ValueError unless the layer gave (b, channels, height, width)."""
    shape = None if activation is None else tuple(activation.shape)
    if shape is None or len(shape) != 4:
        raise ValueError(
            f"Grad-CAM needs a layer with output (b, channels, height, width), but {layer!r} gave "
            f"{shape}; name another layer."
        )


def last_spatial_layer(network: Network, image: Float[Tensor, "1 c h w"]) -> str:
    """Name in the backbone of the last layer before pooling whose map has several positions.

    Raises:
        ValueError: If no layer gives a map, or what comes last are tokens, a map with its channels
            last or, for a small image, a map of one position.
    """
    outputs = map_outputs(network, image)
    pooled = {id(output) for _, module, output in outputs if isinstance(module, POOLING)}
    kept = [(name, output.shape) for name, _, output in outputs if id(output) not in pooled]
    name, shape = kept[-1] if kept else ("", torch.Size())
    if len(shape) != 4 or not is_map(shape, image.shape):
        raise ValueError(
            "Grad-CAM finds no last layer with output (b, channels, height, width) and more than "
            f"one position by itself: {name!r} gives {tuple(shape)} for an image of "
            f"{tuple(image.shape[2:])}. Name a layer, or give larger images."
        )
    return name


def is_map(shape: torch.Size, image: torch.Size) -> bool:
    """Whether (b, channels, height, width) has several positions and the image's proportions."""
    height, width = shape[2:]
    return height * width > 1 and abs(height * image[3] / image[2] - width) <= 1


def map_outputs(network: Network, image: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Outputs of the backbone's modules in the order of their calls, as far as they are maps.

    These are outputs with several positions, and any of a convolution wider than one pixel. The
    tensors are kept, which keeps their ids apart: a container's output is its last child's.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str, module: nn.Module, _: object, output: object) -> None:
        wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        if isinstance(output, Tensor) and output.ndim > 2 and (wide or output[0, 0].numel() > 1):
            outputs.append((name, module, output))

    modules = [(name, module) for name, module in network.backbone.named_modules() if name]
    handles = [module.register_forward_hook(partial(record, name)) for name, module in modules]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
