"""Training until the training images are learnt by heart."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from torch.utils.data import DataLoader

from classifiers.classifier import Classifier


def fit_by_heart(
    classifier: Classifier,
    training: DataLoader[object],
    same: DataLoader[object],
    accuracy: float,
    max_epochs: int,
    out: Path,
    accelerator: str = "auto",
) -> None:
    """Train until the training images are decided as labelled; no checkpoints.

    Warns where that is not reached.

    Args:
        classifier: Trained in place.
        training: The images, in the order of training.
        same: The same images, each once: they are the validation after every epoch.
        accuracy: Share of the images, in (0, 1], at which training stops.
        max_epochs: At which it stops in any case.
        out: Folder for what the trainer may write.
        accelerator: Where it runs.

    Raises:
        ValueError: If ``accuracy`` is outside (0, 1].
    """
    if not 0 < accuracy <= 1:
        raise ValueError(f"accuracy must be in (0, 1], but got {accuracy}.")
    stop = EarlyStopping(
        "val/accuracy",
        mode="max",
        stopping_threshold=accuracy - 1e-6,  # Lightning stops above it, not at it
        patience=max_epochs,
        verbose=True,  # what is reached stays in a log, where no bar is drawn
    )
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=1,
        callbacks=[stop, RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=out,
    )
    trainer.fit(classifier, training, same)
    reached = float(trainer.callback_metrics["val/accuracy"])
    if reached < accuracy - 1e-6:
        warnings.warn(
            f"after {max_epochs} epochs {reached:.3f} of the training images are decided as "
            f"labelled, not {accuracy}: give more epochs or another rate.",
            stacklevel=2,
        )
