"""Maps and masks of every awkward kind."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("integers", "floats", "rectified", "constant")


def maps(kind: str, seed: int, side: int = 9, count: int = 3) -> tuple[Tensor, Tensor]:
    """Maps with many ties, none, half of them, or nothing else; masks of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randn(count, side, side + 1, generator=generator)
    if kind == "integers":
        saliency = saliency.mul(2).round()
    if kind == "rectified":
        saliency = saliency.relu()
    if kind == "constant":
        saliency = torch.full_like(saliency, 0.3)
    share = torch.rand(count, 1, 1, generator=generator)
    mask = torch.rand(saliency.shape, generator=generator) < share
    mask[:, 0, 0] = True
    return saliency, mask
