"""The same seed gives the same bytes, another one gives others."""

from __future__ import annotations

import filecmp
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PHANTOM, SINGLE
from killed import TINY

import evaluate
from datamodules import Phantom
from datamodules.base import Loading
from explainers import Views
from explainers.attribution import SmoothGrad

pytestmark = pytest.mark.faults


def everything(train: Callable[..., None], folder: Path, seed: int) -> dict[str, Path]:
    """Files of a classifier, its explainer and their comparison, made in the same places."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    single = SINGLE.format(network=work / "classifier" / "last.ckpt")
    for name, model in (("classifier", TINY), ("single", single)):
        out = work / name
        out.mkdir(parents=True)
        (out / "preset.yaml").write_text(PHANTOM.format(model=model))
        train(
            *("fit", "-c", out / "preset.yaml", "--out", out, "--logging", "csv"),
            *("--seed_everything", seed, "--data.train", 16, "--data.seed", seed),
            *("--data.augmentation", "Augmentation"),
        )
    evaluate.compare(
        Phantom(train=8, val=4, test=5, loading=Loading(size=32, batch_size=4)),
        str(work / "classifier" / "last.ckpt"),
        {"Single": str(work / "single" / "last.ckpt")},
        {"SmoothGrad": SmoothGrad},
        Views(count=2),
        (0.0, 0.05),
        out=str(work / "compare"),
        pictured=2,
        seed=seed,
        accelerator="cpu",
    )
    kept = work.rename(folder / f"{len(list(folder.iterdir()))}")
    return {str(p.relative_to(kept)): p for p in sorted(kept.rglob("*")) if p.is_file()}


def test_weights_scores_and_report_of_a_seed(
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell_fault: Callable[[str, int, int], None],
) -> None:
    place = "explainers.evaluation.compare"
    ticks = itertools.count()  # seconds and memory differ from run to run
    monkeypatch.setattr(f"{place}.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(f"{place}.peak_memory", lambda *_, **__: 1e6)
    first, second, other = (everything(train, tmp_path, seed) for seed in (0, 0, 1))
    assert first.keys() == second.keys()
    different = {name for name in first if not filecmp.cmp(first[name], second[name], False)}
    tell_fault("same seed, same bytes", len(first), len(first) - len(different))
    assert different == set()
    for name in ("compare/scores.csv", "compare/report.html", "compare/table.csv"):
        assert not filecmp.cmp(first[name], other[name], False), name
    for name in ("classifier/last.ckpt", "single/last.ckpt"):
        one, two = (torch.load(files[name], weights_only=True) for files in (first, other))
        assert any(not v.equal(two["state_dict"][k]) for k, v in one["state_dict"].items()), name
