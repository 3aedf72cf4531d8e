"""The ratios that must not be lost, in a few minutes on a CPU: python -m benchmarks.bench.

Each is measured in one run against what a user would pick instead, or against the target itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli

from benchmarks import explaining, loading, scoring, training
from benchmarks.stopwatch import seconds

FLOOR = 0.5  # share of its target that every ratio must reach


# Name of each ratio, and how much better than what is named it should be; in the order of PARTS.
TARGETS = {
    "explaining: grad-cam's Grad-CAM / Distilled, eager": 10.0,
    "explaining: torchcam's Grad-CAM / Distilled, ONNX": 10.0,
    "explaining: 11 single maps / a map of ten views": 1.0,
    "scoring: a numpy loop over percentiles / ours": 15.0,
    "training: a step of a bare loop / of train.py": 1 / 1.1,
    "loading: images of 224 px a second from the memory map / 5000": 1.0,
    "start-up: importing LightningCLI / train.py --help": 4 / 6,
}


def of_explaining() -> list[float]:
    """Maps of ResNet50's decisions at 224 px, one image."""
    table = explaining.measured("cpu", 224, [1], 5, ["eager", "onnx"], [explaining.STUDENT])
    rows = table[table["what"] == explaining.STUDENT].set_index("form")
    views = 11 * rows["s"]["eager"] / rows["s"]["10 views"]
    return [rows["x grad-cam"]["eager"], rows["x torchcam"]["onnx"], views]


def of_scoring() -> list[float]:
    """Both areas under the curve of 32 maps of 224 px."""
    ours, loops = scoring.measured("cpu", 224, 32, 5, [scoring.loop])
    return [loops["loop"] / ours]


def of_training() -> list[float]:
    """A step of Single on the phantom, 64 px, 32 images."""
    folder, explainer, backbone = "configs/phantom", "single1_w_tv", "resnet18"
    ours, plain = training.measured(folder, explainer, backbone, 64, 32, steps=15, rounds=2)
    return [median(plain) / median(ours)]


def of_loading() -> list[float]:
    """One process that reads 1000 images."""
    return [loading.measured(1000, 224, 32, 2, 5)["from the memory map"] / 5000]


def of_start_up() -> list[float]:
    """Three fresh Pythons each."""

    def start(*arguments: str) -> float:
        command = [sys.executable, *arguments]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True), 3)

    alone = start("-c", "from lightning.pytorch.cli import LightningCLI")
    return [alone / start("train.py", "--help")]


PARTS: list[Callable[[], list[float]]] = [
    of_explaining,
    of_scoring,
    of_training,
    of_loading,
    of_start_up,
]


def main(out: Path = Path("runs/bench.json"), threads: int = 2) -> None:
    """Write and print every ratio beside its target; fail where one is far below.

    Args:
        out: JSON file, name -> ratio.
        threads: Of torch on the CPU.
    """
    torch.set_num_threads(threads)
    found = dict(zip(TARGETS, (ratio for part in PARTS for ratio in part()), strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for name, ratio in found.items():
        print(f"{ratio:7.2f}  (target {TARGETS[name]:.2f})  {name}")
    if lost := [name for name, ratio in found.items() if ratio < FLOOR * TARGETS[name]]:
        sys.exit(f"error: below {FLOOR:g} of the target: {lost}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
