"""What the tests share: W&B offline, two checkpoints trained once, the table of faults."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)

PHANTOM = """
model: {model}
data:
  class_path: datamodules.Phantom
  init_args:
    train: 96
    val: 15
    test: 13
    loading: {{size: 32, batch_size: 4}}
trainer:
  max_epochs: 2
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
CLASSIFIER = """
  class_path: classifiers.Classifier
  init_args:
    network: {class_path: classifiers.Network, init_args: {backbone: resnet18}}
    optimisation: {learning_rate: 1.0e-3, schedule: constant}
    threshold: youden
"""
SINGLE = """
  class_path: explainers.Single
  init_args:
    network: {network}
    convolutions: 1
    geometry: {{widths: [8, 16]}}
    optimisation: {{learning_rate: 5.0e-3, schedule: one_cycle}}
"""
CALLBACKS = """
  callbacks:
    - class_path: explainers.evaluation.callbacks.WeakLocalisation
      init_args: {views: {count: 2}, smoothing: 0.05}
    - class_path: explainers.evaluation.callbacks.GeneratedImages
    - class_path: explainers.evaluation.callbacks.Panel
      init_args: {images: 2}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", help="CSV file for the table of faults: fault,tried,survived,lost")


@pytest.fixture
def tell_fault(record_property: Callable[[str, object], None]) -> Callable[[str, int, int], None]:
    """Tells the table of faults: ``tell_fault("kill -9 of training", tried, survived)``."""
    return lambda fault, tried, survived: record_property("fault", [fault, tried, survived])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With --soak: print and write the faults that were told; those of one name add up."""
    path = terminalreporter.config.getoption("soak")
    if not path:
        return
    told: dict[str, list[int]] = {}
    for report in chain(*map(terminalreporter.getreports, ("passed", "failed"))):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "fault":
                fault, tried, survived = value
                before = told.get(fault, [0, 0])
                told[fault] = [before[0] + tried, before[1] + survived]
    rows = [(fault, n, k, n - k) for fault, (n, k) in sorted(told.items())]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([("fault", "tried", "survived", "lost"), *rows])
    for fault, *counts in rows:
        terminalreporter.write_line(
            "{:6d} tried {:6d} survived {:3d} lost  ".format(*counts) + fault
        )


@pytest.fixture(scope="session", autouse=True)
def offline_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B writes under the tests' own folder and logs in nowhere, whatever key is set."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for kind in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{kind}_DIR", str(folder / kind.lower()))
        yield


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """``train.py`` in this process: its arguments, then it is as if the command had ended."""
    import wandb

    from train import main

    def run(*arguments: str | Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py"])
            main([str(argument) for argument in arguments])
        wandb.finish()
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)

    return run


@pytest.fixture(scope="session")
def phantom_classifier(
    train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Best checkpoint of a ResNet18 on 32-pixel phantoms, config.yaml and logs beside it."""
    folder = tmp_path_factory.mktemp("classifier")
    preset = folder / "preset.yaml"
    preset.write_text(PHANTOM.format(model=CLASSIFIER))
    train("fit", "-c", preset, "--out", folder, "--logging", "csv")
    return folder / "best.ckpt"


@pytest.fixture(scope="session")
def phantom_single(
    train: Callable[..., None], phantom_classifier: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Best checkpoint of a Single explainer of `phantom_classifier`, logged to W&B offline."""
    folder = tmp_path_factory.mktemp("single")
    preset = folder / "preset.yaml"
    preset.write_text(PHANTOM.format(model=SINGLE.format(network=phantom_classifier)) + CALLBACKS)
    train("fit", "-c", preset, "--out", folder, "--logging", "wandb")
    return folder / "best.ckpt"


@pytest.fixture
def browser() -> Iterator[Page]:
    """An empty page; what its scripts complain of fails the test, refused requests do not."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    told: list[str] = []
    with sync_playwright() as playwright:
        # a sandbox needs rights that a container lacks; the pages are our own
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        yield page
        chromium.close()
    assert [line for line in told if not line.startswith("Failed to load resource")] == []
