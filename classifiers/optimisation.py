"""Optimiser and learning rate schedule, chosen by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau


@dataclass(frozen=True)
class Optimisation:
    """Adam with a schedule.

    Attributes:
        learning_rate: Initial rate; the peak of "one_cycle".
        schedule: "constant", "one_cycle" and "cosine" over the whole training, step by step, or
            "plateau": divided by ``divisor`` after ``patience`` epochs in which ``monitor`` has
            not fallen by 0.01 %.
        weight_decay: Decoupled (AdamW); 0 is plain Adam.
        divisor: Of "plateau".
        patience: Of "plateau", epochs, 1 or more.
        monitor: Logged value that "plateau" watches, lower is better.
        epoch_images: A training set that is smaller is gone through in an epoch as often as it
            fits into so many images, so that few images do not mean few steps.
        abnormal_per_normal: Images of other classes than the first for each of the first, in an
            epoch of unchanged length, at least; 0 takes the images as they are. None is 0 for
            classifiers, the attribute ``abnormal_per_normal`` of their class for explainers.

    Raises:
        ValueError: If ``patience`` is below 1, or one of the last two below 0.
    """

    learning_rate: float = 1e-4
    schedule: Literal["constant", "one_cycle", "cosine", "plateau"] = "plateau"
    weight_decay: float = 0.0
    divisor: float = 3.0
    patience: int = 3
    monitor: str = "val/loss"
    epoch_images: int = 0
    abnormal_per_normal: int | None = None

    def __post_init__(self) -> None:
        """Check the values that torch would take silently."""
        if self.patience < 1:
            raise ValueError(f"patience must be 1 epoch or more, but got {self.patience}.")
        for name in ("epoch_images", "abnormal_per_normal"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, but got {value}.")

    def configure(
        self, parameters: Iterable[Parameter], trainer: Trainer
    ) -> OptimizerLRSchedulerConfig:
        """What ``configure_optimizers`` returns for the trainable ``parameters``."""
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        adam = AdamW if self.weight_decay else Adam
        optimizer = adam(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.schedule == "plateau":
            # torch counts the epochs that are let pass, one less than those that are waited for.
            plateau = ReduceLROnPlateau(
                optimizer, factor=1 / self.divisor, patience=self.patience - 1
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": self.monitor},
            }
        if self.schedule == "constant":
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ConstantLR(optimizer, 1)}}
        steps = _steps(trainer)
        by_step = (
            OneCycleLR(optimizer, self.learning_rate, steps)
            if self.schedule == "one_cycle"
            else CosineAnnealingLR(optimizer, steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}


def check_plan(trainer: Trainer) -> None:
    """Compare the steps that a schedule was planned for, in a resumed training, with those to come.

    Raises:
        ValueError: If there are more; "one_cycle" has no rate for them, "cosine" goes up again.
    """
    for config in trainer.lr_scheduler_configs:
        plan = config.scheduler.state_dict()
        planned, steps = plan.get("total_steps", plan.get("T_max")), _steps(trainer)
        if planned is not None and steps > planned:
            raise ValueError(
                f"the schedule of the resumed training was planned for {planned} steps, but "
                f"{steps} are asked for; keep max_epochs as it was, or start anew."
            )


def _steps(trainer: Trainer) -> int:
    return int(trainer.estimated_stepping_batches)
