"""A decoder over the classifier's own feature maps."""

from __future__ import annotations

from itertools import pairwise
from math import log2

import torch
from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network
from explainers.base import untouched
from explainers.layers import channels_first, is_map, map_outputs, raw_outputs
from explainers.learned.generators import Folded, double, joined

SIDE = 224  # pixels of the image that shows a backbone's stages


def stages(network: Network, finest: int = 2) -> dict[str, int]:
    """Layers that end a backbone's stages, in the order of their resolution, and their channels.

    Of all layers with 1/2, 1/4, 1/8, ... of the image's resolution the last one at the top of the
    backbone; none above 1/finest, and none that is called more than once.

    Raises:
        ValueError: If no layer gives a map.
    """
    image = torch.zeros(1, 3, SIDE, SIDE, device=network.mean.device)
    with untouched(network):
        network.eval()
        outputs = map_outputs(network, image)
    names = [name for name, *_ in outputs]
    found: dict[int, tuple[str, int]] = {}
    for name, _, output in outputs:
        try:
            shape = channels_first(output, name, image.shape).shape
        except ValueError:  # neither a map nor tokens on a grid
            continue
        level, depth = round(log2(SIDE / shape[2])), name.count(".")
        if not is_map(shape, image.shape) or 2**level < finest or names.count(name) > 1:
            continue
        if level not in found or depth <= found[level][0].count("."):
            found[level] = (name, shape[1])
    if not found:
        raise ValueError(
            f"no layer of {network.recipe['backbone']!r} gives a map that a student could read; "
            "leave features out."
        )
    return dict(found[level] for level in sorted(found))


class FeatureDecoder(nn.Module):
    """From the feature maps of a frozen classifier, and the image, to features at 1/reduction.

    Each stage goes through batch norm and a 1x1 convolution; from the coarsest on, two
    convolutions join it with what came from below, resized bilinearly, as in a U-Net. The
    classifier is read and not a part of this module.

    Args:
        network: The classifier.
        channels: Of the images.
        widths: Of the image's branch and the stages, finest first; the last one goes for the rest.
        reduction: Of the features given.

    Raises:
        ValueError: If the classifier has no layer that gives a map.
    """

    def __init__(
        self, network: Network, channels: int, widths: tuple[int, ...], reduction: int
    ) -> None:
        super().__init__()
        found = stages(network, reduction)
        self.layers = list(found)
        wide = [widths[min(k, len(widths) - 1)] for k in range(len(found) + 1)]
        self.image = nn.Sequential(Folded(reduction), double(channels * reduction**2, wide[0]))
        self.read = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(source), nn.Conv2d(source, width, 1))
            for source, width in zip(found.values(), wide[1:], strict=True)
        )
        self.up = nn.ModuleList(double(upper + lower, upper) for upper, lower in pairwise(wide))
        self.to(memory_format=torch.channels_last)

    def forward(
        self, image: Float[Tensor, "b c h w"], network: Network
    ) -> Float[Tensor, "b f h2 w2"]:
        """Features at 1/reduction of the image's size, rounded up; any weights of the backbone."""
        skips = [self.image(image)]
        outputs = raw_outputs(network, self.layers, image)
        for name, layer, output in zip(self.layers, self.read, outputs, strict=True):
            skips.append(layer(channels_first(output, name, image.shape)))
        return joined(skips.pop(), skips, self.up)
