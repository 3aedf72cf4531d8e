"""Training until the training images are learnt by heart."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from classifiers.classifier import Classifier
from classifiers.network import Network, decide


class UntilFit(Callback):
    """Stops training once the classifier decides enough of its training images as labelled.

    Counted over all its batches in evaluation mode, at the end of each epoch.

    Args:
        accuracy: Share of the images, in (0, 1].

    Attributes:
        reached: Of the last epoch.

    Raises:
        ValueError: If ``accuracy`` is outside (0, 1].
    """

    def __init__(self, accuracy: float = 0.95) -> None:
        if not 0 < accuracy <= 1:
            raise ValueError(f"accuracy must be in (0, 1], but got {accuracy}.")
        self.accuracy, self.reached = accuracy, 0.0

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count over the training images, as they are in evaluation."""
        network = pl_module.network
        assert isinstance(network, Network)
        network.eval()
        right, count = 0, 0
        for batch in trainer.train_dataloader or []:
            decision = decide(network(batch["image"].to(pl_module.device)), network.threshold)
            right += int((decision.cpu() == batch["label"]).sum())
            count += len(decision)
        network.train()
        self.reached = right / count
        trainer.should_stop = self.reached >= self.accuracy


def fit_by_heart(
    classifier: Classifier,
    data: LightningDataModule,
    accuracy: float,
    max_epochs: int,
    out: Path,
    accelerator: str = "auto",
) -> None:
    """Train until the training images are decided as labelled, without validation or checkpoints.

    Warns where that is not reached.

    Args:
        classifier: Trained in place.
        data: Its training images.
        accuracy: Share of the images at which training stops.
        max_epochs: At which it stops in any case.
        out: Folder for what the trainer may write.
        accelerator: Where it runs.
    """
    until = UntilFit(accuracy)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=1,
        callbacks=[until, RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=out,
    )
    trainer.fit(classifier, datamodule=data)
    if until.reached < accuracy:
        warnings.warn(
            f"after {max_epochs} epochs {until.reached:.3f} of the training images are decided as "
            f"labelled, not {accuracy}: give more epochs or another rate.",
            stacklevel=2,
        )
