"""Comparing, explaining and exporting, stopped by kill -9 or by a full disk."""

from __future__ import annotations

import csv
import multiprocessing
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from files import write_image
from torch import Tensor

import evaluate
from datamodules import Phantom
from datamodules.base import Loading
from explainers import __main__ as command
from explainers.attribution import Gradient, InputXGradient
from explainers.evaluation.finished import Finished
from explainers.evaluation.metrics.localisation import PERCENTILES
from explainers.evaluation.results import Results
from explainers.inference import Answer
from explainers.inference.card import write_card
from explainers.inference.explain import Model, explain_files

pytestmark = pytest.mark.faults
KEPT = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "0.1.0"
SHARES = [pytest.param(2), pytest.param(10, marks=pytest.mark.slow)]
Tell = Callable[[str, int, int], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluate", "explainers.__main__", "explainers.inference"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMADV_TRUST", "networks.Tiny")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def run(context: Any, call: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """Seconds that an undisturbed call takes in a process of its own."""
    start, process = time.monotonic(), context.Process(target=call, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return time.monotonic() - start


def kill(
    context: Any, call: Callable[..., object], arguments: tuple[Any, ...], after: float
) -> bool:
    """Kill -9 a call after some seconds; whether it was still at work."""
    process = context.Process(target=call, args=arguments)
    process.start()
    process.join(after)
    alive = process.exitcode is None
    process.kill()
    process.join()
    return alive


def kill_at_work(
    context: Any,
    call: Callable[..., object],
    arguments: Callable[[Path], tuple[Any, ...]],
    out: Path,
    after: float,
) -> None:
    """Kill -9 a call after some seconds; one that has ended by then begins anew, to die sooner."""
    while not kill(context, call, arguments(out), after):
        shutil.rmtree(out)
        after /= 2


def moments(count: int, seconds: float) -> list[float]:
    """When to kill: at random in each of ``count`` equal parts of a run, its start aside."""
    rng = random.Random(0)
    return [(0.1 + 0.85 * (k + rng.random()) / count) * seconds for k in range(count)]


def compared(out: Path) -> tuple[Any, ...]:
    """Arguments of a small comparison."""
    data = Phantom(train=8, val=8, test=8, loading=Loading(size=16, batch_size=4))
    explainers = {"Single": str(KEPT / "single.ckpt")}
    methods = {"Gradient": Gradient, "Input x Gradient": InputXGradient}
    more = (None, (0.0, 0.05), "test", None, None, str(out), 2, 0, 1, "cpu")
    return data, str(KEPT / "classifier.ckpt"), explainers, methods, *more


def rows_of(out: Path) -> dict[str, Any]:
    """What a comparison says, times and memory aside."""
    texts = {name: (out / f"{name}.csv").read_text() for name in ("scores", "images", "table")}
    costs = pd.read_csv(out / "costs.csv")[["method", "views", "control", "sigma"]]
    return {**texts, "costs": costs.to_csv()}


@pytest.mark.parametrize("count", SHARES)
def test_a_killed_comparison_goes_on(
    count: int, server: Any, tmp_path: Path, tell_fault: Tell
) -> None:
    run(server, evaluate.compare, compared(tmp_path / "warm"))
    seconds = run(server, evaluate.compare, compared(tmp_path / "whole"))
    expected, survived = rows_of(tmp_path / "whole"), 0
    for k, after in enumerate(moments(count, seconds)):
        out = tmp_path / str(k)
        kill_at_work(server, evaluate.compare, compared, out, after)
        done = {path: path.stat().st_mtime_ns for path in out.glob("finished/*.json")}
        run(server, evaluate.compare, compared(out))
        kept = all(path.stat().st_mtime_ns == when for path, when in done.items())
        survived += kept and rows_of(out) == expected
    tell_fault("kill -9 of evaluate.py compare", count, survived)
    assert survived == count


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder of 40 pictures, one of which cannot be read."""
    rng = np.random.default_rng(0)
    for k in range(40):
        write_image(tmp_path / "in" / f"{k:02}.png", rng.integers(0, 256, (20, 24), np.uint8))
    (tmp_path / "in" / "07.png").write_text("no picture")
    return tmp_path / "in"


def explained(pictures: Path, out: Path) -> tuple[Any, ...]:
    """Arguments of an explanation of a folder."""
    model, size, batch_size = str(KEPT / "single.ckpt"), 16, 2
    return model, [str(pictures)], str(out), size, None, 0.0, batch_size, 95.0, "cpu"


def lines_of(out: Path) -> list[dict[str, str]]:
    """Lines of a table of results in order."""
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return sorted(csv.DictReader(file), key=lambda line: line["image"])


@pytest.mark.parametrize("count", SHARES)
def test_a_killed_explanation_goes_on(
    count: int, server: Any, pictures: Path, tmp_path: Path, tell_fault: Tell
) -> None:
    run(server, command.explain, explained(pictures, tmp_path / "warm"))
    seconds = run(server, command.explain, explained(pictures, tmp_path / "whole"))
    expected, survived = lines_of(tmp_path / "whole"), 0
    maps = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.npy")}
    assert len(expected) == 40
    for k, after in enumerate(moments(count, seconds)):
        out = tmp_path / str(k)
        kill_at_work(server, command.explain, partial(explained, pictures), out, after)
        run(server, command.explain, explained(pictures, out))
        found = {path.name: path.read_bytes() for path in out.glob("*.npy")}
        survived += lines_of(out) == expected and found == maps
    tell_fault("kill -9 of explain", count, survived)
    assert survived == count


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_or_none(
    server: Any, tmp_path: Path, tell_fault: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there after the kill is refused or answers; the next call is as if none was."""
    monkeypatch.setenv("SIMADV_TRUST", "networks.Tiny")
    data = Phantom(train=8, val=8, test=8, loading=Loading(size=16, batch_size=4))
    out, count = tmp_path / "out", 4
    arguments = (str(KEPT / "single.ckpt"), data, str(out), None, 0.0, 8)
    seconds, rng = run(server, command.export, arguments), random.Random(0)
    names = {path.name for path in out.iterdir()}
    survived = 0
    for _ in range(count):
        kill(server, command.export, arguments, rng.uniform(0.3, 0.98) * seconds)
        try:
            command.exported_model(out / "model.onnx").answer(torch.rand(1, 1, 16, 16))
            survived += 1
        except ValueError as error:
            survived += "card.json is missing" in str(error)
    run(server, command.export, arguments)
    tell_fault("kill -9 of export", count, survived)
    assert survived == count
    assert {path.name for path in out.iterdir()} == names
    assert command.exported_model(out / "model.onnx")


def bright(image: Tensor) -> Answer:
    """The image itself is the map; bright ones are ill."""
    share = image.mean((1, 2, 3))
    probability = torch.stack([1 - share, share], 1)
    return Answer(probability, probability.argmax(1), image, 1 - image, image.mean(1))


MODEL = Model(bright, 16, 1, ["wöll", "ill"])


def test_half_a_line_is_never_taken_for_a_whole(tmp_path: Path, tell_fault: Tell) -> None:
    """The table cut at every byte of its last two lines, one of which tells of an error."""
    write_image(tmp_path / "in" / "a.png", np.full((20, 24), 10, np.uint8))
    (tmp_path / "in" / "ü.png").write_text("no picture")
    write_image(tmp_path / "in" / "b, c.png", np.eye(24, dtype=np.uint8) * 255)
    inputs, out = [str(tmp_path / "in")], tmp_path / "out"
    explain_files(MODEL, inputs, out)
    content, expected = (out / "results.csv").read_bytes(), lines_of(out)
    first = content.index(b"\r\n", content.index(b"\r\n") + 2) + 2
    survived = 0
    for end in range(first, len(content)):
        (out / "results.csv").write_bytes(content[:end])
        explain_files(MODEL, inputs, out)
        survived += lines_of(out) == expected
    tell_fault("results.csv cut in its last lines", len(content) - first, survived)
    assert survived == len(content) - first


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file may grow beyond some bytes, which fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results() -> Results:
    rows = [
        {"id": str(k), "group": "", "method": "m", "views": "plain", "smoothing": "raw"}
        | {"metric": metric, "value": k / 9}
        for k in range(9)
        for metric in ("average_precision", "total_auc", *(f"iou_{p:g}" for p in PERCENTILES))
    ]
    images = pd.DataFrame({"id": [str(k) for k in range(9)], "group": ""})
    images = images.assign(label="ill", decision="ill", correct=True)
    images = images.assign(**{"p(well)": 0.2, "p(ill)": 0.8})
    costs = pd.DataFrame([{"method": "m", "views": "plain", "control": False, "sigma": 0.0}])
    return Results(pd.DataFrame(rows), images, costs.assign(seconds=0.1, megabytes=1.0))


def card(folder: Path) -> None:
    write_card({"name": "model", "limits": ["one"]}, folder)


def row(folder: Path) -> None:
    Finished(folder).write(folder / "row.json", {"value": [0.1] * 9})


def tables(folder: Path) -> None:
    results().write(folder)


@pytest.mark.parametrize("write", [tables, row, card])
def test_a_full_disk_leaves_the_good_files(
    write: Callable[[Path], None], tmp_path: Path, tell_fault: Tell
) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with full_disk(5), pytest.raises(OSError, match=r"cannot be written \(.*\); what was there"):
        write(tmp_path)
    tell_fault("disk full while a table is written", 1, int(contents(tmp_path) == before))
    assert contents(tmp_path) == before


def test_an_explanation_goes_on_after_a_full_disk(tmp_path: Path, tell_fault: Tell) -> None:
    for k in range(4):
        write_image(tmp_path / "in" / f"{k}.png", np.full((20, 24), 60 * k, np.uint8))
    inputs, out = [str(tmp_path / "in")], tmp_path / "out"
    explain_files(MODEL, [str(tmp_path / "in" / "0.png")], out)
    before = contents(out)
    with full_disk(1500), pytest.raises(OSError, match=r"\.npy cannot be written"):
        explain_files(MODEL, inputs, out)
    survived = contents(out) == before
    tell_fault("disk full while a map is written", 1, int(survived))
    assert survived
    explain_files(MODEL, inputs, out)
    assert [line["error"] for line in lines_of(out)] == [""] * 4
