"""What makes a training step the same whatever the size of its batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenNorms(Callback):
    """Batch norm with the running statistics: torch has none over processes on a CPU."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
