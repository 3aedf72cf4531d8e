"""W&B out of reach, silent or failing, and a metrics.csv that cannot be written."""

from __future__ import annotations

import errno
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from conftest import PHANTOM
from killed import TINY
from offline import wandb_records

from explainers.loggers import SteadyCSV

pytestmark = pytest.mark.faults
TellFault = Callable[[str, int, int], None]


def closed() -> tuple[int, socket.socket]:
    """A port at which nobody listens."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken.getsockname()[1], taken


def silent() -> tuple[int, socket.socket]:
    """A port at which every connection is taken, and nothing is said."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(50)
    kept: list[Any] = []

    def take() -> None:
        while True:
            try:
                kept.append(server.accept())
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    return server.getsockname()[1], server


@pytest.fixture(params=[closed, silent], ids=["closed", "silent"])
def online(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with a key, at a server on this machine that does not answer."""
    port, server = request.param()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # its settings are read once a process
    yield
    wandb.teardown()
    server.close()


def fit(train: Callable[..., None], out: Path, *more: object) -> None:
    preset = out / "preset.yaml"
    preset.write_text(PHANTOM.format(model=TINY))
    train("fit", "-c", preset, "--out", out, "--data.train", 16, "--logging", "wandb", *more)


@pytest.mark.usefixtures("online")
def test_training_goes_on_where_wandb_does_not_answer(
    train: Callable[..., None], tmp_path: Path, tell_fault: TellFault
) -> None:
    with pytest.warns(UserWarning, match="kept offline") as told:
        fit(train, tmp_path)
    sentences = [str(w.message) for w in told if "the run is kept offline" in str(w.message)]
    losses = pd.read_csv(tmp_path / "metrics.csv")["train/loss"].dropna()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [i.value_json for r in wandb_records(file) for i in r.history.item]
    sent = {float(value) for value in rows if value.replace(".", "").replace("e-", "").isdigit()}
    whole = set(losses.round(4)) <= {round(value, 4) for value in sent}
    tell_fault("W&B unreachable or silent", 1, int(whole and len(losses) == 8))
    assert len(sentences) == 1
    assert whole
    assert len(losses) == 8  # 2 epochs of 4 steps


def test_training_goes_on_where_wandb_breaks(
    train: Callable[..., None],
    tmp_path: Path,
    tell_fault: TellFault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wandb.sdk.wandb_run import Run

    def broken(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Run, "log", broken)
    with pytest.warns(UserWarning, match="takes no more") as told:
        fit(train, tmp_path)
    losses = pd.read_csv(tmp_path / "metrics.csv")["train/loss"].dropna()
    tell_fault("W&B broken within a run", 1, int(len(losses) == 8))
    assert sum("W&B takes no more" in str(w.message) for w in told) == 1
    assert len(losses) == 8


def test_rows_that_cannot_be_written_are_written_later(
    tmp_path: Path, tell_fault: TellFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = SteadyCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()

    def full(*args: object) -> None:
        """A new header empties the file before it is full."""
        Path(logger.experiment.metrics_file_path).write_text("st")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(logger.experiment), "_rewrite_with_new_header", full)
        logger.log_metrics({"a": 2.0, "b": 3.0}, 1)
        with pytest.warns(UserWarning, match="kept in memory"):
            logger.save()
        logger.log_metrics({"a": 2.0, "b": 3.0}, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one is enough
            logger.save()
    assert pd.read_csv(tmp_path / "metrics.csv")["a"].tolist() == [1]
    logger.finalize("success")
    rows = pd.read_csv(tmp_path / "metrics.csv")
    tell_fault("metrics.csv on a full disk", 1, int(rows["a"].tolist() == [1, 2, 2]))
    assert rows["a"].tolist() == [1, 2, 2]
    assert rows["b"].tolist()[1:] == [3, 3]
