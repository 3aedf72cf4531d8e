"""The generators' networks: images in the classifier's input space in, images or features out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """Which U-Net a generator is.

    Attributes:
        unet: "residual" is the geometry of arXiv:2012.07332, "plain" two conv-BN-ReLU a level
            with bilinear upsampling; anything else is an encoder name of
            segmentation-models-pytorch ("resnet18"), whose decoder is as wide as ``widths``.
        widths: Channels per level, full resolution first.
        channels: Of the images: 1 grey, 3 RGB.
        output: How the last convolution's output becomes an image in [0, 1]. "sigmoid" squashes
            it; "clip" cuts it and lets the gradient pass outside, where a hard clip has none;
            "delta" adds it to the image and cuts the sum like "clip".
        encoder_weights: ImageNet weights of an smp encoder (downloaded), or None.
        reduction: The U-Net works at 1/reduction of the image's resolution, on blocks of that
            side folded into channels, and what it adds is resized bilinearly: changes are smooth,
            and cost a reduction-th squared. Above 1 with output "delta" alone.

    Raises:
        ValueError: If there are fewer than two widths, no such encoder, or a reduction that does
            not go with the output.
    """

    unet: str = "plain"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    channels: Literal[1, 3] = 1
    output: Literal["sigmoid", "clip", "delta"] = "sigmoid"
    encoder_weights: Literal["imagenet"] | None = None
    reduction: int = 1

    def __post_init__(self) -> None:
        """Check the user's values."""
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(
                f"widths of a U-Net must be two or more positive numbers, but got {self.widths}."
            )
        if self.reduction < 1 or (self.reduction > 1 and self.output != "delta"):
            raise ValueError(
                "reduction must be 1, or more with output 'delta' (a whole image cannot be drawn "
                f"at a lower resolution), but got {self.reduction} with {self.output!r}."
            )

    def build(self, planes: int = 0) -> tuple[nn.Module, int]:
        """A U-Net from images to features at 1/reduction of their size, and the features' number.

        It takes ``planes`` more channels than the images have. Its weights are laid out channels
        last, which convolves faster on CPUs and GPUs.
        """
        unet: nn.Module
        features, inputs = self.widths[0], (self.channels + planes) * self.reduction**2
        if self.unet == "residual":
            unet, features = ResidualUNet(inputs, self.widths), 2 * features
        elif self.unet == "plain":
            unet = PlainUNet(inputs, self.widths)
        else:
            unet = Encoded(self.unet, inputs, self.widths, self.encoder_weights)
        if self.reduction > 1:
            unet = nn.Sequential(Folded(self.reduction), unet)
        return unet.to(memory_format=torch.channels_last), features

    def head(self, features: int, convolutions: int | Literal["authors"] = 1) -> nn.Sequential:
        """The small CNN of one output, from features to the image's channels.

        Where it is added to the image its last convolution starts small and without bias: the
        generated images start near the image.
        """
        if convolutions == "authors":
            network = authors_head(features, self.channels)
        else:
            network = head(features, self.channels, convolutions)
        if self.output == "delta":
            for weight, factor in zip(network[-1].parameters(), (0.1, 0.0), strict=True):
                weight.data.mul_(factor)
        return network

    def draw(self, output: Tensor, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The generated image in [0, 1] from a head's output and the image."""
        if self.output == "sigmoid":
            return output.sigmoid()
        if self.reduction > 1:
            output = F.interpolate(output, scale_factor=float(self.reduction), mode="bilinear")
            output = output[:, :, : image.shape[2], : image.shape[3]]
        drawn = image + output if self.output == "delta" else output
        return drawn.clamp(0, 1).detach() + (drawn - drawn.detach())  # the bracket is exactly 0


class Folded(nn.Module):
    """Blocks of pixels folded into channels; edges are repeated where the sides are no multiple."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f h2 w2"]:
        """Images with c * side ** 2 channels at 1/side of the size, rounded up."""
        down, right = (-length % self.side for length in image.shape[2:])
        return F.pixel_unshuffle(F.pad(image, (0, right, 0, down), "replicate"), self.side)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """The authors' block: batch norm, ReLU, 3x3 convolution with bias."""
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
    )


class ResidualUNet(nn.Module):
    """The U-Net of the authors' public code (a departure from the text: it has residual levels).

    Level 0: two blocks. Each lower level: a block to the new width, 2x2 max-pool, three blocks
    added to their input. Decoder, per level: two blocks to the upper width, nearest upsampling,
    concatenation with the skip. Gives ``2 * widths[0]`` features.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        first = widths[0]
        self.entry = nn.Sequential(block(channels, first), block(first, first))
        self.down = nn.ModuleList(
            nn.Sequential(block(upper, lower), nn.MaxPool2d(2)) for upper, lower in pairwise(widths)
        )
        self.residual = nn.ModuleList(
            nn.Sequential(*(block(width, width) for _ in range(3))) for width in widths[1:]
        )
        inputs = [2 * width for width in widths[1:-1]] + [widths[-1]]
        self.up = nn.ModuleList(
            nn.Sequential(block(source, width), block(width, width))
            for source, width in zip(inputs, widths[:-1], strict=True)
        )
        self.stride = 2 ** (len(widths) - 1)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f h w"]:
        """Features of the image, at its size."""
        return padded(self._forward, image, self.stride)

    def _forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.entry(image)
        skips = []
        for down, residual in zip(self.down, self.residual, strict=True):
            skips.append(features)
            features = down(features)
            features = features + residual(features)
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            features = torch.cat([F.interpolate(up(features), scale_factor=2.0), skip], 1)
        return features


class PlainUNet(nn.Module):
    """U-Net with two conv-BN-ReLU a level, max-pooling and bilinear upsampling."""

    def __init__(self, channels: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.entry = double(channels, widths[0])
        self.down = nn.ModuleList(double(upper, lower) for upper, lower in pairwise(widths))
        self.up = nn.ModuleList(double(upper + lower, upper) for upper, lower in pairwise(widths))
        self.stride = 2 ** (len(widths) - 1)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f h w"]:
        """Features of the image, at its size."""
        return padded(self._forward, image, self.stride)

    def _forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.entry(image)
        skips = []
        for down in self.down:
            skips.append(features)
            features = down(F.max_pool2d(features, 2))
        return joined(features, skips, self.up)


def joined(features: Tensor, skips: Sequence[Tensor], up: nn.ModuleList) -> Tensor:
    """The way up of a U-Net: resized bilinearly to each skip, the finest last, and joined to it."""
    for level, skip in zip(reversed(up), reversed(skips), strict=True):
        larger = F.interpolate(features, skip.shape[2:], mode="bilinear", align_corners=False)
        features = level(torch.cat([larger, skip], 1))
    return features


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Twice: 3x3 convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for source in (inputs, outputs):
        layers += [nn.Conv2d(source, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Encoded(nn.Module):
    """A U-Net of segmentation-models-pytorch with any of its encoders.

    Encoder layers below the deepest level used are frozen: they take no part in training or L_G.
    """

    def __init__(
        self, encoder: str, channels: int, widths: tuple[int, ...], weights: str | None
    ) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp  # slow to import

        try:
            self.network = smp.Unet(
                encoder,
                encoder_depth=len(widths),
                encoder_weights=weights,
                decoder_channels=tuple(reversed(widths)),
                in_channels=channels,
                classes=widths[0],
            )
        except KeyError as error:
            raise ValueError(
                f"unet must be 'residual', 'plain' or an encoder of segmentation-models-pytorch "
                f"('resnet18'), but got {encoder!r}."
            ) from error
        self.stride = 2 ** len(widths)
        image = torch.zeros(1, channels, self.stride, self.stride)
        if not image.is_meta:  # an outline without memory has no gradients to look at
            self._freeze_unused(image)

    @torch.enable_grad()
    def _freeze_unused(self, image: Tensor) -> None:
        self.network.eval()(image).sum().backward()
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.network.train().zero_grad()

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f h w"]:
        """Features of the image, at its size."""
        return padded(self.network, image, self.stride)


def padded(
    network: Callable[[Tensor], Tensor], image: Float[Tensor, "b c h w"], stride: int
) -> Tensor:
    """Features of an image whose sides need not be multiples of ``stride``: edges are repeated."""
    height, width = image.shape[2:]
    down, right = -height % stride, -width % stride
    if not down and not right:
        return network(image)
    return network(F.pad(image, (0, right, 0, down), "replicate"))[:, :, :height, :width]


def head(features: int, channels: int, convolutions: int) -> nn.Sequential:
    """The small CNN of one output: ``convolutions`` 3x3 ones, the last to the image's channels."""
    hidden = [nn.Conv2d(features, features, 3, padding=1) for _ in range(convolutions - 1)]
    return nn.Sequential(*hidden, nn.Conv2d(features, channels, 3, padding=1))


def authors_head(features: int, channels: int) -> nn.Sequential:
    """The head of the authors' public code: 3x3 to 32, 3x3 to 16, 1x1, no activation between."""
    return nn.Sequential(
        nn.Conv2d(features, 32, 3, padding=1),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.Conv2d(16, channels, 1),
    )


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Weights that are not frozen, in the network's order."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
