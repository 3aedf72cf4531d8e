"""Callbacks that score a learned explainer in validation and test and show what it draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.io import write_png

from classifiers.network import Network, decide, probabilities
from explainers.base import Explainer
from explainers.evaluation.metrics import Decisions, ImageSimilarity, Localisation
from explainers.evaluation.pictures import panel
from explainers.views import Views, smooth

Batch = Mapping[str, Any]


class StageCallback(Callback):
    """Sees every batch of validation and test, then logs scores under ``val/`` or ``test/``.

    The sanity check before training is left out.

    Args:
        every_n_epochs: Training epochs between two computations; the last of max_epochs counts too.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be 1 or more, but got {every_n_epochs}.")
        self.every_n_epochs = every_n_epochs

    def reset(self, module: LightningModule) -> None:
        """Forget the batches seen so far."""

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Take in one batch and what the module's step returned for it."""
        raise NotImplementedError

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Tensor]:
        """Scores of the stage over all processes, by name."""
        raise NotImplementedError

    def wanted(self, trainer: Trainer) -> bool:
        """Whether this evaluation counts: between epochs of training, not every one does."""
        if trainer.sanity_checking:
            return False
        done = trainer.current_epoch + 1
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not fitting or done % self.every_n_epochs == 0 or done == trainer.max_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that explains nothing.

        Raises:
            TypeError: If it is not an explainer.
        """
        if not isinstance(pl_module, Explainer):
            raise TypeError(
                f"{type(self).__name__} scores explainers, but the model is a "
                f"{type(pl_module).__name__}: take the callback out of its config."
            )

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wanted(trainer):
            self.reset(pl_module)

    def _batch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.wanted(trainer) and isinstance(outputs, Mapping):
            self.add(pl_module, outputs, batch)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wanted(trainer):
            stage = "test" if trainer.testing else "val"
            scores = self.finish(trainer, pl_module, stage)
            pl_module.log_dict({f"{stage}/{name}": value for name, value in scores.items()})

    on_validation_epoch_start = on_test_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = _batch
    on_validation_epoch_end = on_test_epoch_end = _end


class WeakLocalisation(StageCallback):
    """Average precision, IoU and AUC of the maps against the masks, of the images that have one.

    Logged as ``<plain|views>_<raw|smoothed>/<score>``.

    Args:
        views: Geometric views to average over; None scores plain maps alone.
        smoothing: Sigma of the Gaussian over the map, share of the image side; 0 scores raw maps
            alone.
        every_n_epochs: Training epochs between two computations.
    """

    def __init__(
        self, views: Views | None = None, smoothing: float = 0.0, every_n_epochs: int = 1
    ) -> None:
        super().__init__(every_n_epochs)
        self.views: dict[str, Views | None] = {"plain": None} | ({"views": views} if views else {})
        self.sigmas = {"raw": 0.0} | ({"smoothed": smoothing} if smoothing else {})
        self.metrics: dict[str, Localisation] = {}

    def reset(self, module: LightningModule) -> None:
        """Start one metric per variant on the module's device."""
        names = [f"{views}_{form}" for views in self.views for form in self.sigmas]
        self.metrics = {name: Localisation().to(module.device) for name in names}

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Score the maps of a batch's annotated images."""
        assert isinstance(module, Explainer)
        annotated = batch["has_mask"]
        if not annotated.any():
            return
        image, mask = batch["image"][annotated], batch["mask"][annotated]
        for name, views in self.views.items():
            raw = module.explain(image, views=views)
            for form, sigma in self.sigmas.items():
                self.metrics[f"{name}_{form}"].update(smooth(raw, sigma), mask)

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Tensor]:
        """Means over the annotated images."""
        return {
            f"{variant}/{score}": value
            for variant, metric in self.metrics.items()
            for score, value in metric.compute().items()
        }


class GeneratedImages(StageCallback):
    """Decisions kept and flipped, and SSIM and PSNR of the three pairs of images.

    Tells at the end of a training for which class the adversarial images flip less than one
    decision in a hundred: they show no evidence of it. The normal class is left out where an epoch
    has several abnormal images for each normal one, as its decisions are given up for the others.
    """

    RARELY = 0.01  # 0.00 where a map was random, 0.11 where it was not (benchmarks/LOG.md)
    PAIRS = (("image", "similar"), ("image", "adversarial"), ("similar", "adversarial"))

    def reset(self, module: LightningModule) -> None:
        """Start the metrics on the module's device."""
        network = module.network
        assert isinstance(network, Network)
        self.decisions = Decisions(network.num_classes).to(module.device)
        self.pairs = {pair: ImageSimilarity().to(module.device) for pair in self.PAIRS}

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Compare the generated images and what the classifier says of them."""
        assert isinstance(module.network, Network)
        logits = [
            outputs[key].float() for key in ("logits", "logits_similar", "logits_adversarial")
        ]
        decision, similar, adversarial = (decide(z, module.network.threshold) for z in logits)
        self.decisions.update(
            decision, probabilities(logits[1]), probabilities(logits[2]), similar, adversarial
        )
        images = {"image": batch["image"], **outputs}
        for (first, second), metric in self.pairs.items():
            metric.update(images[first], images[second])

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Tensor]:
        """Shares, AUC of decisions and mean similarities."""
        scores = {f"decisions/{name}": value for name, value in self.decisions.compute().items()}
        for (first, second), metric in self.pairs.items():
            for name, value in metric.compute().items():
                scores[f"{name}/{first}_{second}"] = value
        return scores

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of each class whose decisions the last validation saw hardly ever flipped."""
        assert isinstance(pl_module.network, Network)
        given_up = getattr(pl_module.optimisation, "abnormal_per_normal", 0) > 1
        for k, name in enumerate(pl_module.network.class_names):
            share = trainer.callback_metrics.get(f"val/decisions/flipped_class{k}")
            if share is not None and share < self.RARELY and (k or not given_up):
                rank_zero_warn(
                    f"The adversarial images flip {share:.1%} of the validation images decided "
                    f"{name!r}: they show no evidence of it, so compare the map with others "
                    "(evaluate.py compare) before you trust it on such images."
                )


class Panel(StageCallback):
    """The first annotated images: image, similar, adversarial, map, top 5 % with true outline.

    Written as PNG under ``panels/`` in the run folder, and to W&B and TensorBoard where they log.

    Args:
        images: Rows of the panel.
        views: Views of the map; None shows the plain one.
        smoothing: Of the map, share of the image side.
        every_n_epochs: Training epochs between two panels.
    """

    def __init__(
        self,
        images: int = 6,
        views: Views | None = None,
        smoothing: float = 0.0,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs)
        self.images, self.views, self.smoothing = images, views, smoothing

    def reset(self, module: LightningModule) -> None:
        """Start collecting rows."""
        self.rows: list[dict[str, Tensor]] = []

    def add(self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Keep annotated images until the panel is full."""
        assert isinstance(module, Explainer)
        missing = self.images - sum(len(row["image"]) for row in self.rows)
        chosen = batch["has_mask"].nonzero().flatten()[:missing]
        if not len(chosen):
            return
        image = batch["image"][chosen]
        self.rows.append(
            {
                "image": image,
                "similar": outputs["similar"][chosen],
                "adversarial": outputs["adversarial"][chosen],
                "saliency": module.explain(image, views=self.views, smoothing=self.smoothing),
                "mask": batch["mask"][chosen],
            }
        )

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Tensor]:
        """Draw the panel on the first process and hand it to the loggers."""
        if not self.rows or not trainer.is_global_zero:
            return {}
        columns = {key: torch.cat([row[key] for row in self.rows]) for key in self.rows[0]}
        picture = panel(**columns)
        folder = Path(trainer.default_root_dir) / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stage}_{trainer.current_epoch:04d}.png"
        write_png(picture, str(path))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"{stage}/panel", [str(path)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"{stage}/panel", picture, trainer.global_step)
        return {}
