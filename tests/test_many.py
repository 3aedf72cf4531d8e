"""Many processes and machines: what they learn is what one process learns."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended_well(*running: subprocess.Popen[str]) -> list[str]:
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), told
    return told


def step(config: Path, out: Path, batch_size: int, devices: int) -> list[object]:
    """Command of one step of training on sixteen images without anything random."""
    return [
        *("train.py", "fit", "-c", config, "--out", out, "--logging", "off"),
        *("--devices", devices, "--data.loading.batch_size", batch_size),
        *("--data.train", 16, "--trainer.max_epochs", 1, "--trainer.limit_val_batches", 0),
        *("--trainer.callbacks", "frozen.FrozenNorms", "--checkpoint.monitor", "null"),
        *("--checkpoint.save_last", "true"),
    ]


def gradients(folder: Path) -> dict[int, Tensor]:
    """Of the only step: Adam's first average holds a tenth of them."""
    content = torch.load(folder / "last.ckpt", weights_only=True)
    assert content["global_step"] == 1
    state = content["optimizer_states"][0]["state"]
    return {number: 10 * values["exp_avg"] for number, values in state.items()}


def test_two_processes_give_the_gradients_of_one(phantom_single: Path, tmp_path: Path) -> None:
    config = phantom_single.parent / "config.yaml"
    one = start(*step(config, tmp_path / "one", 16, 1))
    [told] = ended_well(one)
    assert "Peak memory of the process, rank 0: " in told
    ended_well(start(*step(config, tmp_path / "two", 8, 2)))
    expected, found = gradients(tmp_path / "one"), gradients(tmp_path / "two")
    assert expected.keys() == found.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    assert largest > 1e-3
    for number, each in expected.items():
        torch.testing.assert_close(found[number], each, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_nodes(phantom_single: Path, tmp_path: Path, devices: int) -> None:
    """The commands of docs/scaling.md, both nodes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        start(
            *("-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", node),
            *("--nproc_per_node", devices, "--rdzv_backend", "c10d", "--rdzv_id", "dry"),
            *("--rdzv_endpoint", f"127.0.0.1:{port}", "train.py", "fit"),
            *("-c", phantom_single.parent / "config.yaml", "--out", tmp_path, "--logging", "csv"),
            *("--devices", devices, "--trainer.num_nodes", 2, "--trainer.max_epochs", 1),
        )
        for node in range(2)
    ]
    told = ended_well(*nodes)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 96 // (4 * 2 * devices), told  # images, batch, processes
    peaks = re.findall(r"rank \d: \d+ MB", "".join(told))
    assert len(peaks) == 2 * devices
