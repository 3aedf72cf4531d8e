from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Adam, AdamW

from classifiers.optimisation import Optimisation


def configured(steps: int = 100, **options: Any) -> dict[str, Any]:
    """Optimiser and schedule of two parameters, one of them frozen."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)]
    trainer = Mock(Trainer, estimated_stepping_batches=steps)
    configuration: Any = Optimisation(**options).configure(parameters, trainer)
    return {"optimizer": configuration["optimizer"], **configuration["lr_scheduler"]}


def rates(steps: int, **options: Any) -> list[float]:
    """Learning rate of every step of a whole training."""
    made = configured(steps, **options)
    seen = []
    for _ in range(steps):
        seen.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["scheduler"].step()
    return seen


def test_plateau_divides_by_three_after_three_epochs_by_hand() -> None:
    made = configured(learning_rate=0.9)
    seen = []
    for loss in [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]:
        made["scheduler"].step(loss)
        seen.append(made["optimizer"].param_groups[0]["lr"])
    assert seen == pytest.approx([0.9] * 3 + [0.3] * 6 + [0.1])
    assert made["monitor"] == "val/loss"


def test_one_cycle_peaks_at_the_learning_rate_and_ends_low() -> None:
    seen = rates(100, learning_rate=0.1, schedule="one_cycle")
    assert max(seen) == pytest.approx(0.1)
    assert seen.index(max(seen)) == 29  # 30 % up
    assert seen[0] == pytest.approx(0.1 / 25)
    assert seen[-1] < 1e-5


def test_cosine_by_hand() -> None:
    seen = rates(4, learning_rate=1.0, schedule="cosine")
    assert seen == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_whole_training_schedules_go_step_by_step(schedule: str) -> None:
    assert configured(schedule=schedule)["interval"] == "step"


def test_constant() -> None:
    assert rates(5, learning_rate=0.2, schedule="constant") == [0.2] * 5


@pytest.mark.parametrize(("decay", "kind"), [(0.0, Adam), (0.01, AdamW)])
def test_weight_decay_is_decoupled_and_frozen_weights_left_out(
    decay: float, kind: type[Adam]
) -> None:
    optimizer = configured(weight_decay=decay)["optimizer"]
    assert type(optimizer) is kind
    assert [len(p) for group in optimizer.param_groups for p in group["params"]] == [2]
    assert optimizer.param_groups[0]["weight_decay"] == decay


def test_patience_of_no_epoch() -> None:
    with pytest.raises(ValueError, match="patience must be 1 epoch or more, but got 0"):
        Optimisation(patience=0)


@pytest.mark.parametrize("name", ["epoch_images", "abnormal_per_normal"])
def test_an_epoch_of_less_than_no_images(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, but got -1"):
        Optimisation(**{name: -1})
