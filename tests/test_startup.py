"""What is slow to import is imported where it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded(code: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after some code."""
    told = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code + told]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        ("import explainers, classifiers", {"torch", "lightning", "kornia"}),
        ("from explainers import Explainer, Views", {"lightning", "torchvision", "timm", "captum"}),
        ("from classifiers import Network, load_network", {"lightning", "torchvision", "timm"}),
        ("import train", {"captum", "torchcam", "sklearn", "timm", "wandb"}),
    ],
)
def test_what_is_not_imported(code: str, slow: set[str]) -> None:
    assert not loaded(code) & slow


def test_every_name_of_a_package_can_be_had() -> None:
    code = "import explainers, classifiers\n"
    code += "for package in (explainers, classifiers):\n"
    code += "    for name in package.__all__: assert getattr(package, name).__name__ == name\n"
    assert "lightning" in loaded(code)
