"""The mean over images of any score of theirs, exact over several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMean(Metric):
    """Mean of each score over the images that have it: those that are not NaN.

    Args:
        score: Function of a batch that gives one value per image (b), or several by name: any of
            `localisation_scores`, `pointing_game`, `confidence_drop`, ... with its settings bound.
        names: Of the scores that are averaged; "mean" for a function that names none.
    """

    full_state_update = False
    total: Tensor
    counts: Tensor

    def __init__(
        self,
        score: Callable[..., Tensor | Mapping[str, Tensor]],
        names: Sequence[str] = ("mean",),
    ) -> None:
        super().__init__()
        self.score, self.names = score, tuple(names)
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.long(), dist_reduce_fx="sum")

    def update(self, *arguments: Tensor) -> None:
        """Add a batch, as the function takes it."""
        scores = self.score(*arguments)
        named = {"mean": scores} if isinstance(scores, Tensor) else scores
        values = torch.stack([named[name].double() for name in self.names])
        self.total = self.total + values.nansum(1)
        self.counts = self.counts + (~values.isnan()).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Mean of each score by name, NaN where no image had it, and "count" of the first."""
        means = dict(zip(self.names, self.total / self.counts, strict=True))
        return {**means, "count": self.counts[0].double()}
