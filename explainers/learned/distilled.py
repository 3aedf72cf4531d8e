"""Distilled: one small network that draws at once what a teacher needs many views for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.base import Explainer
from explainers.content import content_hash, source_of
from explainers.learned.base import Generated, LearnedExplainer, OnePass, summed
from explainers.learned.features import FeatureDecoder
from explainers.learned.generators import Geometry, head
from explainers.learned.similar_adversarial import SimilarAdversarial
from explainers.learned.taught import Taught
from explainers.views import Views, warp

TINY = 1e-8  # stands for the mean of maps that are 0 everywhere
FLOOR = 1e-3  # of a map's mean: lower values count as this, or a zero would decide alone


def agreement(maps: Sequence[Float[Tensor, "b h w"]]) -> Float[Tensor, "b h w"]:
    """Geometric mean of several maps, each in units of its own mean; a single map as it is.

    exp(mean_i log(max(m_i / mean(m_i), 0.001))): high where none of them is low. Negative values
    count as 0.

    Source: this project's own; what else was tried stands in benchmarks/LOG.md, 2026-11-27.
    """
    if len(maps) == 1:
        return maps[0]
    positive = [one.clamp(min=0) for one in maps]
    shares = [one / one.mean((1, 2), keepdim=True).clamp(min=TINY) for one in positive]
    return torch.stack(shares).clamp(min=FLOOR).log().mean(0).exp()


class Distilled(OnePass):
    """A student's map in one pass, trained on maps that were averaged over views and smoothed.

    They are a teacher's, or the `agreement` of a teacher's and those of other methods. The map of a
    training image is computed once, when the image is first seen, stays in a file for a training
    that goes on, and is turned with the image; so it is the image before augmentation that counts.
    The similar and the adversarial image are the teacher's, for who asks to see them; a map does
    not need them.

    Args:
        teacher: A trained Single or Duo, or its checkpoint; stays as it is.
        views: Of the maps that are learnt (Eq. 11); their ranges are those of training, too.
        smoothing: Of the maps that are learnt, sigma as a share of the image side.
        widths: Of the student's plain U-Net.
        reduction: It works at 1/reduction of the image's resolution, see `Geometry`. A map of fewer
            than some 50 pixels a side is too coarse for small evidence.
        optimisation: Optimiser and schedule.
        witnesses: Other methods that have to agree with the teacher, by name. They are not part of
            a checkpoint, which holds their names: an explanation does not need them.
        features: Whether a second branch learns the same from the classifier's own feature maps,
            and the map is the mean of both. It then carries over better to other places than those
            of training (benchmarks/LOG.md), and costs a pass of the classifier.
        maps: Folder of the maps that are learnt, so that several students share them; None: that of
            the run.

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
        witnesses: Mapping[str, Callable[[Network], Explainer]] | None = None,
        features: bool = False,
        maps: str | None = None,
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
        self.witnesses = {k: build(drawn.network) for k, build in (witnesses or {}).items()}
        self.agreeing = list(self.witnesses)
        self.views, self.smoothing = views or Views(vertical_flip=0.0), smoothing
        self.maps = maps
        self.features = features
        self.unet, _ = geometry.build()
        self.head = head(widths[0], 1, 1)
        if features:
            self.reader = FeatureDecoder(self.network, channels, widths, reduction)
            self.reader_head = head(widths[0], 1, 1)
        self.scale = nn.Buffer(torch.zeros(()))  # mean of the first maps that are learnt
        self.taught = Taught()

    def forward(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """The teacher's similar and adversarial image, each (b, c, h, w) in [0, 1]."""
        similar, adversarial = self.teacher(image)
        return similar, adversarial

    def student(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b branches h2 w2"]:
        """A map of each branch, in units of ``scale``, at 1/reduction of the size, rounded up."""
        maps = [self.head(self.unet(image))]
        if self.features:
            maps.append(self.reader_head(self.reader(image, self.network)))
        return F.softplus(torch.cat(maps, 1))

    def drawn(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's images, and the student's map."""
        similar, adversarial = self(image)
        return similar, adversarial, self.plain(image)

    def plain(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
        """The mean of the branches' maps, not negative."""
        low = self.scale * self.student(image).mean(1, keepdim=True)
        size = [self.geometry.reduction * side for side in low.shape[2:]]
        large = F.interpolate(low, size, mode="bilinear", align_corners=False)
        return large[:, 0, : image.shape[2], : image.shape[3]]

    def teach(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """The maps that are learnt, averaged and smoothed, at the student's resolution.

        Raises:
            ValueError: If the student comes from a checkpoint and its witnesses are not given.
        """
        if self.agreeing != list(self.witnesses):
            raise ValueError(
                f"the student learnt where its teacher agrees with {self.agreeing}, which are not "
                "in its file: train it by its preset, which names them."
            )
        ways = [self.teacher, *self.witnesses.values()]
        maps = agreement([way.explain(image, None, self.views, self.smoothing) for way in ways])
        return F.avg_pool2d(maps[:, None], self.geometry.reduction, ceil_mode=True)

    def targets(
        self, image: Float[Tensor, "b c h w"], names: list[str]
    ) -> Float[Tensor, "b 1 h2 w2"]:
        """`teach` of images, computed once for each name."""
        if new := self.taught.find(image, names):
            self.taught.add(image[new], [names[k] for k in new], self.teach(image[new]))
        return torch.stack([self.taught.maps[name] for name in names]).to(image)

    def on_fit_start(self) -> None:
        """Take the maps that a training of the same folder has computed."""
        ways = [self.teacher, *self.witnesses.values()]
        name = content_hash(
            [self.teacher.description(), self.teacher.state_dict(), self.witnesses],
            [self.views, self.smoothing, self.geometry.reduction],
            [source_of(type(way)) for way in ways],
        )
        if name:
            folder = Path(self.maps or self.trainer.default_root_dir)
            self.taught.open(folder, f"taught-{name}", self.global_rank)

    def on_train_epoch_end(self) -> None:
        """Keep the maps that are new."""
        self.taught.write()

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Keep the images as they are before the data module's augmentation."""
        return {**batch, "unturned": batch["image"]}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean absolute difference from the maps that are learnt, both turned alike."""
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
        """Mean absolute difference of each branch's maps from these, in units of ``scale``."""
        scale = self.scale or maps.mean().clamp(min=TINY)  # before the first training step
        found = self.student(image)
        return F.l1_loss(found, (maps / scale).expand_as(found))

    def objective(self, image: Float[Tensor, "b c h w"]) -> tuple[dict[str, Tensor], Generated]:
        """Difference from the maps that are learnt, and the teacher's images."""
        return self.compared(image, self.teach(image))

    def batch_objective(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Generated]:
        """`objective` of a batch, the maps that are learnt from memory."""
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on where a checkpoint's student learnt from others.

        Raises:
            ValueError: If its witnesses are others.
        """
        super().on_load_checkpoint(checkpoint)
        before = checkpoint["explainer"]["arguments"].get("witnesses", [])
        if before != self.agreeing:
            raise ValueError(
                f"the checkpoint's student has the witnesses {before}, but {self.agreeing} are "
                "given: name the same ones, or start anew in another --out."
            )

    def arguments(self) -> dict[str, Any]:
        """Plain constructor arguments that rebuild this explainer; of witnesses their names."""
        return {
            "teacher": self.teacher.description(),
            "views": asdict(self.views),
            "smoothing": self.smoothing,
            "widths": list(self.geometry.widths),
            "reduction": self.geometry.reduction,
            "witnesses": list(self.agreeing),
            "features": self.features,
            "optimisation": asdict(self.optimisation),
        }
