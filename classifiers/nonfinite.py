"""What a training does about a loss or a gradient that is not finite."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm


class NonFinite(Callback):
    """Looks at the loss and the gradients before every optimiser step: one wait for the device.

    A gradient is left to the scaler of 16-bit training, which draws its scale from those that are
    too large.

    Args:
        action: "stop" ends the training there; "skip" warns, leaves the step out and puts what the
            batch did to running means back.

    Raises:
        ValueError: At the step, its term and its images are named, with "stop".
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        self.action = action
        self.batches: list[dict[str, Any]] = []  # since the last step
        self.buffers: list[Tensor] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Remember the images and, to skip, the buffers as they are before the step's first."""
        if self.action == "skip" and not self.batches:
            self.buffers = [buffer.clone() for buffer in pl_module.buffers()]
        self.batches.append(batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss."""
        self.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Stop or skip where the loss or a gradient is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        looked = list(self.losses)
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            looked.append(get_total_norm(gradients, torch.inf))
        if bool(torch.stack([value.float() for value in looked]).isfinite().all()):
            return
        told = (
            f"step {trainer.global_step}: {self.term(trainer, pl_module)} is not finite, from "
            f"images {self.images()}"
        )
        if self.action == "stop":
            raise ValueError(
                f"{told}; the last checkpoints are from before it: look at the images, lower the "
                "learning rate, or leave such steps out by --on_nonfinite skip."
            )
        warnings.warn(f"{told}; the step is left out.", stacklevel=2)
        optimizer.zero_grad()  # without gradients a step changes nothing
        for buffer, before in zip(pl_module.buffers(), self.buffers, strict=True):
            buffer.copy_(before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the images once their step is made."""
        if not trainer.fit_loop._should_accumulate():
            self.batches, self.losses = [], []

    def term(self, trainer: Trainer, module: LightningModule) -> str:
        """The logged terms that are not finite, else the first parameter with such a gradient."""
        terms = [
            name
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/") and not bool(value.isfinite().all())
        ]
        if terms:
            return ", ".join(terms)
        if not bool(torch.stack(self.losses).isfinite().all()):
            return "the loss"
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name}"
        return "a gradient"

    def images(self) -> str:
        """Ids of the images with values that are not finite, or of all in the step."""
        ids = [name for batch in self.batches for name in batch["id"]]
        finite = torch.cat([batch["image"].flatten(1).isfinite().all(1) for batch in self.batches])
        return ", ".join(name for name, f in zip(ids, finite.tolist(), strict=True) if not f) or (
            ", ".join(ids)
        )
