"""What W&B is told: reached or not, and which checkpoints a run started from."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb

from explainers.tracking import artifact_name, artifact_names, declare_inputs, wandb_mode


class Run:
    """A run that notes what it uses; W&B knows some artifacts."""

    def __init__(self, offline: bool = False, known: tuple[str, ...] = ()) -> None:
        self.offline, self.known = offline, known
        self.used: list[str] = []

    def use_artifact(self, name: str) -> None:
        if name not in self.known:
            raise wandb.errors.CommError(f"{name} not found")
        self.used.append(name)


def test_wandb_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() is None  # WANDB_MODE is set in all tests
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("wandb.login", lambda prompt, verify: False)
    assert wandb_mode() == "offline"
    monkeypatch.setattr("wandb.login", lambda prompt, verify: True)
    assert wandb_mode() is None


def test_the_artifact_of_a_checkpoint_is_that_of_its_last_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "best.ckpt"
    assert artifact_name(checkpoint) is None
    for run in ("offline-run-20260102_000000-b2", "run-20260103_000000-c3", "latest-run"):
        (tmp_path / "wandb" / run).mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-20260101_000000-a1").mkdir()
    assert artifact_name(checkpoint) == "model-c3:best"
    assert artifact_name(tmp_path / "last.ckpt") == "model-c3:latest"


def test_lightnings_own_name_of_an_artifact(phantom_single: Path) -> None:
    (log,) = (phantom_single.parent / "wandb").glob("offline-run-*/*.wandb")
    name, alias = str(artifact_name(phantom_single)).split(":")
    assert name.encode() in log.read_bytes()
    assert alias == "best"


def test_inputs_are_declared_where_wandb_knows_them(tmp_path: Path) -> None:
    for folder, run in (("one", "run-20260101_000000-a1"), ("two", "run-20260101_000000-b2")):
        (tmp_path / folder / "wandb" / run).mkdir(parents=True)
    paths = [tmp_path / folder / "best.ckpt" for folder in ("one", "two", "three")]
    run, names = Run(known=("model-a1:best",)), artifact_names(paths)
    assert names == ["model-a1:best", "model-b2:best"]
    with pytest.warns(UserWarning, match="does not know model-b2:best, so that its lineage"):
        declare_inputs(run, names)
    assert run.used == ["model-a1:best"]
    declare_inputs(Run(offline=True), names)
