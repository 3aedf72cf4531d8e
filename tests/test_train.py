from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from offline import wandb_records
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch.testing import assert_close
from torchvision.io import read_image

from classifiers import load_network
from explainers import Single, load_explainer
from explainers.command import plainly
from explainers.loggers import SteadyCSV, SteadyWandb
from train import build_loggers

ROOT = Path(__file__).parent.parent
Train = Callable[..., None]


def metrics(folder: Path) -> pd.DataFrame:
    """Rows of metrics.csv that hold scores of validation or test."""
    table = pd.read_csv(folder / "metrics.csv")
    return table.dropna(subset=[name for name in ("val/loss", "test/loss") if name in table])


def printed_config(train: Train, *arguments: str | Path) -> dict[str, Any]:
    """The resolved config of a command that is not run."""
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        train(*arguments, "--print_config")
    config: dict[str, Any] = yaml.safe_load(text.getvalue())
    return config


def test_fit_leaves_checkpoints_config_and_metrics(phantom_classifier: Path) -> None:
    folder = phantom_classifier.parent
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["network"]["init_args"]["num_logits"] == 1  # a default
    assert config["data"]["init_args"]["train"] == 96
    assert config["trainer"]["default_root_dir"] == str(folder)
    table = metrics(folder)
    assert table["epoch"].tolist() == [0, 1]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 1
    best = torch.load(phantom_classifier, weights_only=True)
    assert best["epoch"] == table.set_index("epoch")["val/loss"].idxmin()
    threshold = table.set_index("epoch")["val/threshold"][best["epoch"]]
    assert load_network(phantom_classifier).threshold == pytest.approx(threshold)


def test_explainer_of_the_classifier_by_the_second_command(
    phantom_single: Path, phantom_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(phantom_single, tmp_path / "alone.ckpt")
    monkeypatch.chdir(tmp_path)
    explainer, network = load_explainer("alone.ckpt"), load_network(phantom_classifier)
    image = torch.rand(2, 1, 32, 32)
    assert isinstance(explainer, Single)
    assert_close(explainer.network(image), network(image))
    assert explainer.network.threshold == network.threshold
    assert explainer.network.class_names == ["healthy", "opacity"]
    assert explainer.explain(image).shape == (2, 32, 32)
    config = yaml.safe_load((phantom_single.parent / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimisation"]["abnormal_per_normal"] == 4  # its class's
    scores = metrics(phantom_single.parent).iloc[-1]
    assert scores["val/plain_raw/count"] == scores["val/views_smoothed/count"] == 7  # of 15
    assert 0 < scores["val/views_smoothed/average_precision"] < 1


def test_classifier_named_on_the_command_line(train: Train, phantom_classifier: Path) -> None:
    preset = phantom_classifier.parent / "preset.yaml"
    config = printed_config(
        train, "fit", "-c", preset, "--model", "Single", "--model.network", phantom_classifier
    )
    assert config["model"]["class_path"] == "explainers.Single"
    assert config["model"]["init_args"]["network"] == str(phantom_classifier)


def test_resume_goes_on_and_keeps_earlier_metrics(
    train: Train, phantom_classifier: Path, tmp_path: Path
) -> None:
    before = phantom_classifier.parent
    for name in ("last.ckpt", "metrics.csv"):
        shutil.copy(before / name, tmp_path / name)
    for _ in range(2):  # the second time in place of what the first logged
        train(
            *("fit", "-c", before / "config.yaml", "--out", tmp_path, "--trainer.max_epochs", "3"),
            *("--ckpt_path", before / "last.ckpt", "--trainer.limit_train_batches", "2"),
        )
        assert metrics(tmp_path)["epoch"].tolist() == [0, 1, 2]
    earlier = metrics(before)
    assert metrics(tmp_path).iloc[:2][earlier.columns].equals(earlier)
    resumed, first = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path, before))
    assert resumed["epoch"] == 2
    assert resumed["global_step"] == first["global_step"] + 2


def test_last_checkpoint_is_the_last_epochs_where_an_earlier_one_was_best(
    train: Train, phantom_classifier: Path, tmp_path: Path
) -> None:
    train(
        *("fit", "-c", phantom_classifier.parent / "config.yaml", "--out", tmp_path),
        *("--checkpoint.monitor", "epoch", "--checkpoint.mode", "min"),
        *("--trainer.limit_train_batches", "1"),
    )
    saved = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("best", "last")]
    assert [checkpoint["epoch"] for checkpoint in saved] == [0, 1]


def test_early_stopping(train: Train, phantom_classifier: Path, tmp_path: Path) -> None:
    train(
        *("fit", "-c", phantom_classifier.parent / "config.yaml", "--out", tmp_path),
        *("--trainer.max_epochs", "9", "--trainer.limit_train_batches", "1"),
        *("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        *("--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "100"),
    )
    assert metrics(tmp_path)["epoch"].tolist() == [0, 1]


def test_sanity_of_the_command_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("fit", "--model", "Classifier", "--data", "Phantom", "--logging", "paper")
    assert "'paper'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overlay", "kinds"),
    [
        ("wandb", [SteadyCSV, SteadyWandb]),
        ("csv", [SteadyCSV]),
        ("tensorboard", [TensorBoardLogger]),
        ("off", []),
    ],
)
def test_logger_overlays(
    overlay: str, kinds: list[type], train: Train, phantom_classifier: Path, tmp_path: Path
) -> None:
    config = printed_config(
        *(train, "fit", "-c", phantom_classifier.parent / "config.yaml"),
        *("-c", ROOT / "configs" / "loggers" / f"{overlay}.yaml"),
    )
    assert [type(logger) for logger in build_loggers(config["logging"], str(tmp_path))] == kinds


def test_tensorboard_read_back(train: Train, phantom_single: Path, tmp_path: Path) -> None:
    train(
        *("fit", "-c", phantom_single.parent / "config.yaml", "--out", tmp_path),
        *("-c", ROOT / "configs" / "loggers" / "tensorboard.yaml", "--trainer.max_epochs", "1"),
        *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "val/views_raw/average_precision" in events.Tags()["scalars"]
    assert "val/panel" in events.Tags()["images"]
    assert not (tmp_path / "metrics.csv").exists()


def test_wandb_is_told_where_an_explainer_comes_from(
    train: Callable[..., None],
    phantom_classifier: Path,
    phantom_single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "classifier" / "wandb" / "run-20260101_000000-a1").mkdir(parents=True)
    (tmp_path / "teacher" / "wandb" / "run-20260101_000000-b2").mkdir(parents=True)
    network = Path(shutil.copy(phantom_classifier, tmp_path / "classifier"))
    teacher = Path(shutil.copy(phantom_single, tmp_path / "teacher" / "last.ckpt"))
    declared: list[list[str]] = []
    monkeypatch.setattr("train.declare_inputs", lambda run, names: declared.append(names))
    preset = ("fit", "-c", phantom_single.parent / "preset.yaml")
    for model in (
        ["--model.network", network],
        ["--model", "Distilled", "--model.teacher", teacher],
    ):
        train(
            *(*preset, *model, "--out", tmp_path / "out", "--logging", "wandb"),
            *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
            *("--trainer.max_epochs", "1"),
        )
    assert declared == [["model-a1:best"], ["model-b2:latest"]]


def test_offline_wandb_run_read_back(phantom_single: Path) -> None:
    (file,) = phantom_single.parent.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    config = {
        item.key: yaml.safe_load(item.value_json) for r in records for item in r.config.update
    }
    assert config["model"]["class_path"] == "explainers.Single"
    assert config["model"]["init_args"]["margin"] == 1.0  # a default, resolved
    assert config["data"]["init_args"]["loading"]["size"] == 32
    rows = [{i.nested_key[0]: i for i in r.history.item if i.nested_key} for r in records]
    logged = [
        float(row["val/views_smoothed/average_precision"].value_json)
        for row in rows
        if "val/views_smoothed/average_precision" in row
    ]
    expected = metrics(phantom_single.parent)["val/views_smoothed/average_precision"]
    assert logged == pytest.approx(expected.tolist())
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 48  # 2 epochs of 24 steps
    panels = list(file.parent.glob("files/media/images/val/panel_*.png"))
    assert len(panels) == 2
    assert read_image(str(panels[0])).float().std() > 0
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    assert {artifact.type for artifact in artifacts} == {"model"}
    stored = [entry for artifact in artifacts for entry in artifact.manifest.contents]
    assert "best" in {alias for artifact in artifacts for alias in artifact.aliases}
    assert {entry.path for entry in stored} == {"model.ckpt"}
    assert phantom_single.stat().st_size in {entry.size for entry in stored}


def two_processes(config: Path, command: str, out: Path, *more: object) -> None:
    """Run a command of train.py on two CPU processes."""
    arguments = [command, "-c", config, "--out", out, "--logging", "csv", "--devices", 2, *more]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "fixture"), [("test", "phantom_single"), ("validate", "phantom_classifier")]
)
def test_two_processes_give_the_scores_of_one(
    command: str, fixture: str, train: Train, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(fixture)
    config = checkpoint.parent / "config.yaml"
    two_processes(config, command, tmp_path / "two", "--ckpt_path", checkpoint)
    one = ("--ckpt_path", checkpoint, "--out", tmp_path / "one", "--logging", "csv")
    train(command, "-c", config, *one)
    of_one, of_two = (pd.read_csv(tmp_path / n / command / "metrics.csv") for n in ("one", "two"))
    assert set(of_one) == set(of_two)
    assert len(of_one.columns) > 8
    for name in of_one:
        assert of_two[name].to_numpy() == pytest.approx(of_one[name], rel=1e-4, nan_ok=True), name
    if command == "test":  # 13 images, the odd ones annotated
        assert of_two["test/views_raw/count"].tolist() == [6]
    assert metrics(checkpoint.parent)["epoch"].tolist() == [0, 1]  # those of the fit are kept


def test_two_processes_share_the_training_images(phantom_single: Path, tmp_path: Path) -> None:
    two_processes(phantom_single.parent / "config.yaml", "fit", tmp_path, "--trainer.max_epochs", 1)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 96 // (4 * 2)  # images, batch size, processes
    assert metrics(tmp_path)["val/loss"].notna().all()


def sampled_command(sweep: dict[str, Any], rng: random.Random) -> list[str]:
    """What a W&B agent would run for one point of a sweep."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    point = {
        name: {
            "value": rng.choice(p["values"]) if "values" in p else rng.uniform(p["min"], p["max"])
        }
        for name, p in sweep["parameters"].items()
    }
    macros = create_sweep_command_args({"args": point}) | {
        "env": ["/usr/bin/env"],
        "program": [sweep["program"]],
    }
    filled: list[str] = []
    for part in create_sweep_command(sweep["command"]):
        filled += macros[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    return filled


@pytest.mark.parametrize(
    ("name", "scoring", "metric"),
    [
        ("single", "WeakLocalisation", "val/views_smoothed/average_precision"),
        ("unannotated", "WitnessAgreement", "val/witness/Gradient"),
    ],
)
def test_sweep_runs_a_preset_in_a_folder_of_its_own(
    name: str,
    scoring: str,
    metric: str,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / f"{name}.yaml").read_text())
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    command = sampled_command(sweep, random.Random(0))
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    program, *arguments = subprocess.check_output(command, env=env, text=True).splitlines()
    assert program == "train.py"
    monkeypatch.chdir(ROOT)
    config = printed_config(train, *arguments)
    assert config["out"] == "runs/sweeps/abc123"
    for weight, values in sweep["parameters"].items():
        value = config["model"]["init_args"]["weights"][weight.rpartition(".")[2]]
        low, high = values.get("min", min(values.get("values", [0]))), values.get("max", 0.1)
        assert low <= value <= high
        assert f"--{weight}={value}" in arguments
    named = {c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]}
    assert scoring in named  # which logs the metric of the sweep
    assert sweep["metric"]["name"] == metric


def test_scores_of_validation_are_finite(phantom_classifier: Path) -> None:
    scores = metrics(phantom_classifier.parent).filter(like="val/")
    assert len(scores.columns) == 10  # loss, threshold, AUC, accuracy, three per class
    assert np.isfinite(scores.to_numpy()).all()


def test_bad_input_ends_a_command_with_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        with plainly():
            raise ValueError("x must be y.")

    monkeypatch.delenv("SIMADV_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match=r"^error: x must be y\.$"):
        fails()
    monkeypatch.setenv("SIMADV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x must be y"):
        fails()
