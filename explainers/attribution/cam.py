"""Class activation maps at any layer of the backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torchcam.methods
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import interpolate

from classifiers.network import Network
from explainers.attribution.scores import ClassScores, Sign, gradients_on
from explainers.base import Explainer
from explainers.layers import channels_first, is_map, map_outputs, raw_output

POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
FOUND: WeakKeyDictionary[Network, dict[torch.Size, str]] = WeakKeyDictionary()


class GradCAM(Explainer):
    """Activations of a layer, weighted by the mean gradient of the target's score, then ReLU.

    Raw values, upsampled bilinearly to the image. Where the network overwrites the layer's output
    in place (VGG's convolutions, the last norm of DenseNet: an in-place ReLU follows), the layer
    stands for what is left of it.

    Args:
        network: Classifier to explain.
        layer: Dotted name inside ``network.backbone`` ("layer2", "blocks.3", "features.12"). Its
            output is a map (b, channels, height, width), a map with its channels last (Swin) or
            tokens (b, tokens, channels) of a grid of the image's proportions, after a class token
            or registers (ViT: "encoder.layers.encoder_layer_11.ln_1" in torchvision,
            "blocks.11.norm1" in timm; later tokens reach the score through the class token alone).
            By default the last map before pooling, looked for once for a size of images.
        sign: "positive" is the published method; "negative" explains the negated score, that is
            what speaks against the target; "absolute" adds the two maps.

    Raises:
        ValueError: If the backbone has no such layer.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, Eqs. 1, 2.
    """

    extractor: ClassVar[type] = torchcam.methods.GradCAM

    def __init__(self, network: Network, layer: str | None = None, sign: Sign = "positive") -> None:
        self.network, self.layer, self.sign = network, checked_layer(network, layer), sign
        self.scores = ClassScores(network)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Non-negative map at the image's size.

        Raises:
            ValueError: If the layer's output is no map.
        """
        layer = self.layer or last_spatial_layer(self.network, image[:1])
        as_map = partial(channels_first, layer=layer, image=image.shape)
        with (
            gradients_on(image, target) as (own, wanted),
            starting_at(self.network.backbone.get_submodule(layer)),
            self.extractor(self.network.backbone, layer, reshape_transform=as_map) as extractor,
        ):
            scores = self.scores(own)
            signs = {"absolute": (1, -1), "positive": (1,), "negative": (-1,)}[self.sign]
            parts = [
                extractor(wanted.tolist(), sign * scores, normalized=False, retain_graph=True)[0]
                for sign in signs
            ]
        return upsampled(torch.stack(parts).sum(0), image)


class _GradCAMpp(torchcam.methods.GradCAM):
    """torchcam 0.5 divides a copy in its GradCAMpp, so that its alphas stay squared gradients."""

    def _get_weights(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        super()._get_weights(*args, **kwargs)
        hooked: Any = zip(self.hook_a, self.hook_g, strict=True)
        return [plus_plus_weights(activation, gradient) for activation, gradient in hooked]


class _HiResCAM(torchcam.methods.GradCAM):
    def _get_weights(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        super()._get_weights(*args, **kwargs)
        return list(self.hook_g)


class GradCAMPlusPlus(GradCAM):
    """Activations weighted by positive gradients, each with its own share, then ReLU.

    Args, Raises: as `GradCAM`.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063, Eqs. 11, 19; the score is the exponential of
    the class score there, whose common factor is left out.
    """

    extractor = _GradCAMpp


class HiResCAM(GradCAM):
    """Activations times their own gradients, summed over channels, then ReLU.

    Args, Raises: as `GradCAM`.

    Source: Draelos and Carin 2020, arXiv:2011.08891, Eq. 5; the ReLU is of the family.
    """

    extractor = _HiResCAM


class XGradCAM(GradCAM):
    """Grad-CAM with gradients averaged by the activations' shares, then ReLU.

    Args, Raises: as `GradCAM`.

    Source: Fu et al. 2020, arXiv:2008.02312, Eq. 8.
    """

    extractor = torchcam.methods.XGradCAM


class LayerCAM(GradCAM):
    """Activations times their own positive gradients, summed over channels, then ReLU.

    Args, Raises: as `GradCAM`.

    Source: Jiang et al. 2021, doi:10.1109/TIP.2021.3089943, Eqs. 5, 6.
    """

    extractor = torchcam.methods.LayerCAM


class EigenCAM(Explainer):
    """Activations of a layer projected on their first right singular vector; blind to the target.

    Args:
        network: Classifier to explain.
        layer: As `GradCAM`.

    Raises:
        ValueError: If the backbone has no such layer.

    Source: Muhammad and Yeasin 2020, arXiv:2008.00299, Eqs. 4, 5: activations are not centred, as
    they are in the grad-cam package. The sign is open there: here the map's sum is not negative.
    """

    def __init__(self, network: Network, layer: str | None = None) -> None:
        self.network, self.layer = network, checked_layer(network, layer)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Signed map at the image's size.

        Raises:
            ValueError: If the layer's output is no map.
        """
        layer = self.layer or last_spatial_layer(self.network, image[:1])
        return upsampled(first_component(activations(self.network, layer, image)), image)


def plus_plus_weights(
    activation: Float[Tensor, "b k h w"], gradient: Float[Tensor, "b k h w"]
) -> Float[Tensor, "b k"]:
    """Weights of Grad-CAM++ (Eqs. 11, 19): positive gradients, each times its alpha.

    alpha = g^2 / (2 g^2 + g^3 sum(A)) = 1 / (2 + g sum(A)), and 0 where g is 0.
    """
    denominator = 2 + gradient * activation.sum((2, 3), keepdim=True)
    alpha = torch.where(denominator == 0, 0, 1 / denominator)
    return (alpha * gradient.relu()).sum((2, 3))


def first_component(activation: Float[Tensor, "b k h w"]) -> Float[Tensor, "b h w"]:
    """Positions projected on the first right singular vector of (positions x channels)."""
    matrix = activation.flatten(2).mT
    vector = torch.linalg.svd(matrix, full_matrices=False).Vh[:, 0]
    projected = (matrix @ vector[:, :, None])[..., 0]
    sign = torch.where(projected.sum(1, keepdim=True) < 0, -1, 1)
    maps: Tensor = sign * projected
    return maps.reshape(len(activation), *activation.shape[2:])


def checked_layer(network: Network, layer: str | None) -> str | None:
    """The layer's name itself, or a ValueError where the backbone has no such layer."""
    names = [name for name, _ in network.backbone.named_modules() if name]
    if layer is not None and layer not in names:
        near = get_close_matches(layer, names) or names[:5]
        raise ValueError(f"the backbone has no layer {layer!r}; near matches: {near}.")
    return layer


def upsampled(maps: Float[Tensor, "b h w"], image: Tensor) -> Float[Tensor, "b h2 w2"]:
    """Maps at the image's size, bilinear."""
    size = (image.shape[2], image.shape[3])
    return interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@contextmanager
def starting_at(module: nn.Module) -> Iterator[None]:
    """The graph begins at a module's output inside: nothing before it is kept or differentiated."""

    def begin(_module: nn.Module, _inputs: object, output: object) -> object:
        # a clone, since a network may overwrite it in place, which a leaf does not allow
        return output.detach().requires_grad_().clone() if isinstance(output, Tensor) else output

    handle = module.register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def activations(
    network: Network, layer: str, image: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b k _ _"]:
    """Output of a layer for images, as a map; see `channels_first`."""
    return channels_first(raw_output(network, layer, image), layer, image.shape)


def last_spatial_layer(network: Network, image: Float[Tensor, "1 c h w"]) -> str:
    """Name in the backbone of the last layer before pooling whose map has several positions.

    Raises:
        ValueError: If no layer gives a map, or what comes last are tokens, a map with its channels
            last or, for a small image, a map of one position.
    """
    known = FOUND.setdefault(network, {})
    if image.shape in known:
        return known[image.shape]
    outputs = map_outputs(network, image)
    pooled = {id(output) for _, module, output in outputs if isinstance(module, POOLING)}
    kept = [(name, output.shape) for name, _, output in outputs if id(output) not in pooled]
    name, shape = kept[-1] if kept else ("", torch.Size())
    if len(shape) != 4 or not is_map(shape, image.shape):
        raise ValueError(
            "there is no last layer with output (b, channels, height, width) and more than "
            f"one position: {name!r} gives {tuple(shape)} for an image of "
            f"{tuple(image.shape[2:])}. Name a layer, or give larger images."
        )
    known[image.shape] = name
    return name
