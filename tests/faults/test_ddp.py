"""One of two processes of a training is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PHANTOM
from killed import TINY

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MINUTE = 60.0


def started(out: Path, *more: object) -> subprocess.Popen[bytes]:
    """A training on two processes, its output in a file."""
    command = [sys.executable, ROOT / "train.py", "fit", "-c", out / "preset.yaml", "--out", out]
    command += ["--logging", "csv", "--devices", 2, *more]
    path = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=(out / "log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def members(session: int) -> list[int]:
    """Living processes of a session, whoever started them."""
    told = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    rows = [line.split() for line in told.stdout.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_and_name_the_rank(
    rank: int, tmp_path: Path, tell_fault: Callable[[str, int, int], None]
) -> None:
    (tmp_path / "preset.yaml").write_text(PHANTOM.format(model=TINY))
    training = started(tmp_path, "--trainer.max_epochs", 1000, "--data.loading.workers", 1)
    try:
        assert until((tmp_path / "last.ckpt").exists, 4 * MINUTE)
        children = subprocess.run(
            ["pgrep", "-P", str(training.pid), "-f", "train.py"], capture_output=True, check=True
        )
        first, *_ = [int(pid) for pid in children.stdout.split()]
        os.kill(training.pid if rank == 0 else first, signal.SIGKILL)
        ended = until(lambda: training.poll() is not None and not members(training.pid), MINUTE)
        log = (tmp_path / "log").read_text()
        named = f"error: the process of rank {rank} " in log
        tell_fault("kill -9 of a DDP process", 1, int(ended and named))
        assert named, log[-2000:]
        assert ended, members(training.pid)
    finally:
        for pid in members(training.pid):
            os.kill(pid, signal.SIGKILL)
        training.wait()
    epoch = torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"]
    more = ("--ckpt_path", "last", "--trainer.max_epochs", epoch + 2)
    assert started(tmp_path, *more).wait(4 * MINUTE) == 0, (tmp_path / "log").read_text()[-2000:]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == epoch + 1
