"""Images, maps and outlines as RGB tensors, for panels and reports."""

from __future__ import annotations

import matplotlib as mpl
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.utils import make_grid

OUTLINE = (0.2, 1.0, 0.3)  # green stands out on grey images and on the colour map
TINT = (1.0, 0.35, 0.0)


def rgb(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Grey or RGB images as RGB, cut to [0, 1]."""
    return image.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)


def unit_range(saliency: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Each map scaled to [0, 1] by its own minimum and maximum; a constant map becomes 0."""
    low, high = saliency.amin((1, 2), True), saliency.amax((1, 2), True)
    return (saliency - low) / (high - low).clamp(min=torch.finfo(saliency.dtype).tiny)


def heat(saliency: Float[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each map over its own range in a perceptually uniform colour map."""
    colours = mpl.colormaps["inferno"](unit_range(saliency.detach().float().cpu()).numpy())
    return torch.from_numpy(colours[..., :3]).float().permute(0, 3, 1, 2)


def tinted(
    image: Float[Tensor, "b c h w"], saliency: Float[Tensor, "b h w"], percentile: float = 95
) -> Float[Tensor, "b 3 h w"]:
    """The image with the pixels at or above the map's percentile coloured."""
    saliency = saliency.detach().float().cpu()
    top = saliency >= saliency.flatten(1).quantile(percentile / 100, dim=1)[:, None, None]
    colour = torch.tensor(TINT)[:, None, None]
    return torch.where(top[:, None], 0.5 * rgb(image) + 0.5 * colour, rgb(image))


def outlined(picture: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, "b h w"]) -> Tensor:
    """The picture with the inner border of the mask drawn in."""
    mask = mask.cpu()
    border = mask & (max_pool2d((~mask)[:, None].float(), 3, 1, 1)[:, 0] > 0)
    return picture.where(~border[:, None], torch.tensor(OUTLINE)[:, None, None])


def panel(
    image: Float[Tensor, "b c h w"],
    similar: Float[Tensor, "b c h w"],
    adversarial: Float[Tensor, "b c h w"],
    saliency: Float[Tensor, "b h w"],
    mask: Bool[Tensor, "b h w"],
) -> UInt8[Tensor, "3 height width"]:
    """One row per image: image, similar, adversarial, map, top 5 % over the image with outline."""
    marked = outlined(tinted(image, saliency), mask)
    columns = [rgb(image), rgb(similar), rgb(adversarial), heat(saliency), marked]
    grid = make_grid(torch.stack(columns, 1).flatten(0, 1), nrow=len(columns), padding=2)
    picture: Tensor = (grid * 255).round().byte()
    return picture
