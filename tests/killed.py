"""Trainings in processes of their own that are killed: forked from one that has all imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from networks import Small

Moment = Literal["never", "timer", "step", "write", "replace"]

TINY = """
  class_path: classifiers.Classifier
  init_args:
    network: {class_path: classifiers.Network, init_args: {backbone: killed.Tiny}}
    optimisation: {learning_rate: 1.0e-2, schedule: plateau, patience: 1, divisor: 2}
    threshold: youden
"""


class Tiny(Small):
    """A backbone whose checkpoints are small."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)


class Steps(Callback):
    """Notes every step in a file, and kills its process after one of them."""

    def __init__(self, file: Path, last: int | None) -> None:
        self.file, self.last = file, last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self.file.open("a") as file:
            file.write(f"{trainer.global_step}\n")
        if trainer.global_step == self.last:
            kill()


class Growth(Callback):
    """Notes memory (kB), open files and child processes after every 100th step, in a CSV file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % 100:
            return
        with self.file.open("a") as file:
            file.write(",".join(map(str, (trainer.global_step, *held()))) + "\n")


def held() -> tuple[int, int, int]:
    """Memory (kB), open files and child processes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    handles = len(list(Path("/proc/self/fd").iterdir()))
    children = len(multiprocessing.active_children())
    return pages * os.sysconf("SC_PAGESIZE") // 1024, handles, children


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], count: int, half: bool = False) -> Callable[..., Any]:
    """A function that kills its process at the count-th call, of fsync with half of the file."""
    left = count

    def call(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left:
            return function(*given)
        if half:  # what was written outlives the process, so less of it is left
            os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
        return kill()

    return call


def fit(arguments: list[str], steps: Path, moment: Moment, count: int) -> None:
    """``train.py fit`` in this process, which dies at the count-th step or write."""
    import train

    note = Steps(steps, count if moment == "step" else None)
    build = train.TrainCLI.instantiate_trainer

    def noting(self: train.TrainCLI, **kwargs: object) -> Trainer:
        trainer = build(self, **kwargs)
        trainer.callbacks.insert(0, note)  # type: ignore[attr-defined]
        return trainer

    train.TrainCLI.instantiate_trainer = noting  # type: ignore[method-assign]
    if moment == "write":
        os.fsync = dying(os.fsync, count, half=True)
    if moment == "replace":
        Path.replace = dying(Path.replace, count)  # type: ignore[method-assign]
    train.main(["fit", *arguments])


def fork_server() -> ForkServerContext:
    """What forks processes from one that has all imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "killed"])
    return context


def hold(folder: Path, end: Connection) -> None:
    """Have a run's folder to oneself until the end of time."""
    import train

    held = train.lock(folder)
    end.send(held is not None)
    end.recv()


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Another process trains in a folder; it is killed at the end."""
    context = fork_server()
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(folder, there))
    process.start()
    there.close()
    try:
        assert here.poll(60)
        assert here.recv()
        yield
    finally:
        process.kill()
        process.join()


def fit_in_a_process(
    arguments: list[object], steps: Path, moment: Moment = "never", count: int = 0, delay: float = 0
) -> int | None:
    """Exit code of `fit`: -9 where it was killed; "timer" kills ``delay`` s after its start."""
    context = fork_server()
    given = [str(argument) for argument in arguments]
    process = context.Process(target=fit, args=(given, steps, moment, count))
    process.start()
    process.join(delay if moment == "timer" else 300)
    process.kill()
    process.join()
    return process.exitcode
