"""What the README says can be run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text().replace("configs/mine", "configs/busi")  # its copy
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize(
    "target", ["setup", "demo", "test", "check", "bench", "soak", "folds", "table"]
)
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_named_files_exist() -> None:
    named = re.findall(r"\b((?:configs|benchmarks|docs)/[\w./-]+\w)", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named
    assert not missing


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_train_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    with pytest.raises(SystemExit) as end:
        train.main([*words[words.index("train.py") + 1 :], "--print_config"])
    assert end.value.code == 0
    assert "class_path: " in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "evaluate.py compare" in c])
def test_compare_commands_parse(command: str) -> None:
    words = command.split()
    arguments = [*words[words.index("evaluate.py") :], "--print_config"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "classifier: " in done.stdout


def test_python_snippet(phantom_single: Path) -> None:
    snippet = next(block for kind, block in BLOCKS if kind == "python")
    snippet = re.sub(r'load_explainer\("[^"]+"\)', f'load_explainer("{phantom_single}")', snippet)
    names: dict[str, torch.Tensor] = {"images": torch.rand(2, 1, 32, 32)}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["saliency"].shape == names["smoother"].shape == (2, 32, 32)
    assert names["similar"].shape == names["adversarial"].shape == (2, 1, 32, 32)
