"""What every attribution method starts from: the score it explains, gradients, and the sign."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network

Sign = Literal["absolute", "positive", "negative"]


class ClassScores(nn.Module):
    """What attribution explains: one score per class, for callers that index it by the target.

    The logits, or (-z, z) for a single logit z: against its partner in the pair (0, z), class 1
    leads by z and class 0 by -z.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Scores of every class; keeps the graph."""
        logits: Tensor = self.network(image)
        return class_scores(logits)


def class_scores(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b classes"]:
    """One score per class: the logits, or (-z, z) for a single logit z."""
    return torch.cat([-logits, logits], 1) if logits.shape[1] == 1 else logits


@contextmanager
def gradients_on(image: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies that a graph can be built on, whether or not the caller is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield image.detach().clone(), target.clone()


def signed(attribution: Float[Tensor, "b c h w"], sign: Sign) -> Float[Tensor, "b h w"]:
    """Map of an attribution, summed over channels: a grey image and its RGB copy get the same map.

    Args:
        attribution: For the target's score.
        sign: "absolute" counts what speaks for the target and what speaks against it, "positive"
            and "negative" only the one or the other; what does not count is 0.
    """
    total = attribution.detach().sum(1)
    if sign == "absolute":
        return total.abs()
    return (total if sign == "positive" else -total).clamp(min=0)


def at_least_one(name: str, value: int) -> int:
    """The value itself, or a ValueError where it is below 1."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, but got {value}.")
    return value
