"""Distilled: one small network that draws at once what a teacher needs many views for."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.optimisation import Optimisation
from explainers.learned.base import Generated, LearnedExplainer, OnePass, summed
from explainers.learned.generators import Geometry, head
from explainers.learned.similar_adversarial import SimilarAdversarial
from explainers.views import Views, warp

TINY = 1e-8  # stands for the mean of maps that are 0 everywhere


class Distilled(OnePass):
    """A student's map in one pass, trained on a teacher's maps averaged over views and smoothed.

    The teacher's map of a training image is computed once, when the image is first seen, and is
    turned with it; so it is the image before augmentation that counts. The similar and the
    adversarial image are the teacher's, for who asks to see them; a map does not need them.

    Args:
        teacher: A trained Single or Duo, or its checkpoint; stays as it is.
        views: Of the teacher's maps (Eq. 11); their ranges are those of training, too.
        smoothing: Of the teacher's maps, sigma as a share of the image side.
        widths: Of the student's plain U-Net.
        reduction: It works at 1/reduction of the image's resolution, see `Geometry`. A map of fewer
            than some 50 pixels a side is too coarse for small evidence.
        optimisation: Optimiser and schedule.

    Raises:
        ValueError: If the teacher draws no images, or as `Geometry` and `LearnedExplainer`.

    Source: the idea of distillation is of Hinton et al. 2015, arXiv:1503.02531; the loss, the mean
    absolute difference of the maps in units of their mean, is this project's own.
    """

    def __init__(
        self,
        teacher: LearnedExplainer | str,
        views: Views | None = None,
        smoothing: float = 0.05,
        widths: tuple[int, ...] = (16, 32, 64),
        reduction: int = 4,
        optimisation: Optimisation | None = None,
    ) -> None:
        from explainers.learned import load_explainer  # which knows this class

        drawn = load_explainer(teacher) if isinstance(teacher, str) else teacher
        if not isinstance(drawn, SimilarAdversarial):
            raise ValueError(
                "a teacher draws a similar and an adversarial image (Single, Duo), but a "
                f"{type(drawn).__name__} was given."
            )
        channels = drawn.geometry.channels
        geometry = Geometry("plain", widths, channels, output="delta", reduction=reduction)
        super().__init__(drawn.network, geometry, optimisation)
        self.teacher = drawn.eval().requires_grad_(False)
        self.views, self.smoothing = views or Views(vertical_flip=0.0), smoothing
        self.unet, features = geometry.build()
        self.head = head(features, 1, 1)
        self.scale = nn.Buffer(torch.zeros(()))  # mean of the teacher's first maps
        self.taught: dict[str, Tensor] = {}

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """The teacher's similar and adversarial image, each (b, c, h, w) in [0, 1]."""
        similar, adversarial = self.teacher(image)
        return similar, adversarial

    def student(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """Map in units of ``scale`` at 1/reduction of the image's size, rounded up."""
        return F.softplus(self.head(self.unet(image)))

    def drawn(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's images, and the student's map."""
        similar, adversarial = self(image)
        return similar, adversarial, self.plain(image)

    def plain(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
        """The student's map, not negative."""
        low = self.scale * self.student(image)
        size = [self.geometry.reduction * side for side in low.shape[2:]]
        large = F.interpolate(low, size, mode="bilinear", align_corners=False)
        return large[:, 0, : image.shape[2], : image.shape[3]]

    def teach(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """The teacher's averaged and smoothed maps at the student's resolution."""
        maps = self.teacher.explain(image, None, self.views, self.smoothing)
        return F.avg_pool2d(maps[:, None], self.geometry.reduction, ceil_mode=True)

    def targets(
        self, image: Float[Tensor, "b c h w"], names: list[str]
    ) -> Float[Tensor, "b 1 h2 w2"]:
        """`teach` of images, computed once for each name."""
        new = [k for k, name in enumerate(names) if name not in self.taught]
        if new:
            maps = self.teach(image[new]).cpu()
            self.taught |= zip((names[k] for k in new), maps, strict=True)
        return torch.stack([self.taught[name] for name in names]).to(image)

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Keep the images as they are before the data module's augmentation."""
        return {**batch, "unturned": batch["image"]}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean absolute difference between student and teacher, both turned alike."""
        image, maps = batch["unturned"], self.targets(batch["unturned"], batch["id"])
        if not self.scale:
            mean = self.trainer.strategy.reduce(maps.mean(), reduce_op="mean")
            self.scale.copy_(torch.as_tensor(mean).clamp(min=TINY))
        views = replace(self.views, count=len(image), seed=int(torch.randint(2**31, ())))
        turned = warp(image, views.matrices(*image.shape[2:]).to(image))
        forward = views.matrices(*maps.shape[2:]).to(image)
        loss = self.difference(turned, warp(maps, forward))
        self.log("train/loss", loss)
        return loss

    def difference(
        self, image: Float[Tensor, "b c h w"], maps: Float[Tensor, "b 1 h2 w2"]
    ) -> Float[Tensor, ""]:
        """Mean absolute difference between the student's maps and these, in units of ``scale``."""
        scale = self.scale or maps.mean().clamp(min=TINY)  # before the first training step
        return F.l1_loss(self.student(image), maps / scale)

    def objective(self, image: Float[Tensor, "b c h w"]) -> tuple[dict[str, Tensor], Generated]:
        """Difference from the teacher's maps, and the teacher's images."""
        return self.compared(image, self.teach(image))

    def batch_objective(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Generated]:
        """`objective` of a batch, the teacher's maps from memory."""
        return self.compared(batch["image"], self.targets(batch["image"], batch["id"]))

    def compared(
        self, image: Float[Tensor, "b c h w"], maps: Float[Tensor, "b 1 h2 w2"]
    ) -> tuple[dict[str, Tensor], Generated]:
        """Difference from these maps, and the teacher's images."""
        images = self(image)
        logits = self.network(torch.cat([image, *images])).chunk(3)
        return summed({"map": self.difference(image, maps)}, images, logits)

    def train(self, mode: bool = True) -> Distilled:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments that rebuild this explainer from its classifier."""
        return {
            "teacher": self.teacher.description(),
            "views": asdict(self.views),
            "smoothing": self.smoothing,
            "widths": list(self.geometry.widths),
            "reduction": self.geometry.reduction,
            "optimisation": asdict(self.optimisation),
        }
