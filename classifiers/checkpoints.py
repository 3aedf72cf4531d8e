"""Checkpoints: written whole or not at all, and enough to go on as if nothing had happened."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from classifiers.network import read_checkpoint
from classifiers.whole import whole


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are replaced at once, and checked before they are loaded.

    Lightning's own are put together in the system's temporary folder and copied from there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; the one before it stays until the new one is complete."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with whole(Path(path)) as file:
                file.write(content.getbuffer())
        except OSError as error:
            raise OSError(
                f"{error} Make room or name another folder with --out, then go on with --ckpt_path."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Content of an undamaged checkpoint on the CPU; nothing in it is executed."""
        return dict(read_checkpoint(path))


class Checkpoints(ModelCheckpoint):
    """The best epoch's checkpoint, and last.ckpt after every validation of a training.

    Lightning's own ``save_last`` writes last.ckpt only in epochs that are the best so far. A
    training that goes on from last.ckpt makes the steps that it would have made without a stop:
    the checkpoint holds the states of the random generators, and the scores of the validation that
    the end of the epoch (schedule, best checkpoint, early stopping) is still to see.

    Attributes:
        steps: Optimiser steps between two last.ckpt within an epoch; 0 writes none there.
    """

    steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a killed process had begun to write."""
        super().setup(trainer, pl_module, stage)
        self.saved_step, self.resumed = 0, {}  # type: ignore[var-annotated]
        if stage == TrainerFn.FITTING and trainer.is_global_zero:
            for part in Path(str(self.dirpath)).glob("*.ckpt.part"):
                part.unlink()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the next step and the end of the epoch depend on, beside Lightning's own."""
        scores = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint["resume"] = {"draws": generator_states(), "scores": scores}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Wait with it until the training starts: building the loops draws, too."""
        self.resumed = checkpoint.get("resume", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw on where the checkpoint stopped."""
        super().on_train_start(trainer, pl_module)
        self.saved_step = trainer.global_step
        if self.resumed:
            set_generators(self.resumed["draws"])
            trainer.callback_metrics.update(self.resumed["scores"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last, where it is asked for within an epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step, ended = trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.steps and step % self.steps == 0 and step > self.saved_step and not ended:
            self.save_last_checkpoint(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, then the last."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.save_last_checkpoint(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best; take the step of "plateau" that Lightning leaves out after a stop."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.fit_loop.restarting and self.resumed:
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", True)

    def save_last_checkpoint(self, trainer: Trainer) -> None:
        """Write last.ckpt, if anything is to be written."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.saved_step = trainer.global_step
        self.last_model_path = f"{self.dirpath}/last.ckpt"
        trainer.save_checkpoint(self.last_model_path)


def generator_states() -> dict[str, Any]:
    """States of the global generators of torch, Python and NumPy as tensors and plain data."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  what others draw from
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = (numpy[0], numpy[1].tolist(), *numpy[2:])
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, Any]) -> None:
    """Undo `generator_states`; a generator whose device is not there keeps its own state."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
