"""The processes of one training end together."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

PERIOD, GRACE = 0.2, 5.0  # seconds between two looks; for a process to end after the first one


class Companions(Callback):
    """Ends this process, with a sentence, where another one of the training has died.

    Without it those that are left wait at a collective call, with NCCL for half an hour, and with
    gloo they tell of a connection. Processes that something else than Lightning started (torchrun,
    SLURM) are its own concern.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look after the others from now on."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or not isinstance(environment, LightningEnvironment):
            return
        watch = self.watch_children if trainer.local_rank == 0 else self.watch_parent
        arguments = (trainer.strategy.launcher, trainer.global_rank)
        threading.Thread(target=watch, args=arguments, daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The others may end now."""
        self.ended.set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait until it is known whether another process was the cause: that is what is told."""
        if trainer.world_size > 1:
            self.ended.wait(2 * GRACE if trainer.local_rank else 5 * PERIOD)

    def watch_children(self, launcher: Any, rank: int) -> None:
        """End all processes where one of them ended with an error."""
        while not self.ended.wait(PERIOD):
            for number, process in enumerate(launcher.procs, start=1):
                if process.poll():
                    for other in launcher.procs:
                        other.kill()
                    end(rank, rank + number, f"ended with code {process.returncode}")

    def watch_parent(self, launcher: Any, rank: int) -> None:
        """End this process where the one that started it is gone."""
        parent, first = os.getppid(), rank - int(os.environ["LOCAL_RANK"])
        while not self.ended.wait(PERIOD):
            if os.getppid() != parent and not self.ended.wait(GRACE):
                end(rank, first, "is gone")


def end(rank: int, lost: int, how: str) -> None:
    """Tell which process was lost, and end this one at once: collective calls cannot be left."""
    print(
        f"error: the process of rank {lost} {how}, so that of rank {rank} ends too; the same "
        "command with --ckpt_path last goes on.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
