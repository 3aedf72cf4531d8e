"""The mean over images of any score of theirs, exact over several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMean(Metric):
    """Mean of each score over the images that have it: those that are not NaN.

    Args:
        score: Function of a batch that gives one value per image (b), or several by name: any of
            `localisation_scores`, `pointing_game`, `average_drop`, ... with its settings bound.
    """

    full_state_update = False
    total: Tensor
    counts: Tensor

    def __init__(self, score: Callable[..., Tensor | Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.score = score
        self.names: list[str] | None = None
        for state in ("total", "counts"):  # a scalar grows to one value a name: zero plus those
            self.add_state(state, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *arguments: Tensor) -> None:
        """Add a batch, as the function takes it."""
        scores = self.score(*arguments)
        if isinstance(scores, Tensor):
            scores = {"mean": scores}
        self.names = list(scores)
        values = torch.stack([value.double() for value in scores.values()])
        self.total = self.total + values.nansum(1)
        self.counts = self.counts + (~values.isnan()).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Mean of each score by name ("mean" if it has none), and "count" of the first.

        NaN where no image had that score.
        """
        means = torch.atleast_1d(self.total / self.counts)
        named = dict(zip(self.names or ["mean"], means, strict=True))
        return {**named, "count": torch.atleast_1d(self.counts)[0]}
