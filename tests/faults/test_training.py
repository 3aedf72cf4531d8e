"""A training that is killed, meets a full disk, or a loss that is not finite."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHANTOM, SINGLE
from killed import TINY, Moment, fit_in_a_process, holding
from torch import Tensor

from classifiers.classifier import Classifier
from classifiers.network import read_checkpoint
from classifiers.whole import whole
from datamodules import Phantom
from datamodules.base import Record, Sample
from train import lock

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
TellFault = Callable[[str, int, int], None]
EPOCHS, STEPS = 3, 6  # of each
DUO = SINGLE.replace("Single", "Duo").replace("    convolutions: 1\n", "")
FLIPPED = "    weights: {{flipped: 0.5}}\n"
OPTIONS = (
    *("--logging", "csv", "--data.train", 4 * STEPS, "--trainer.max_epochs", EPOCHS),
    *("--data.augmentation", "Augmentation", "--data.loading.batch_size", 4),
    *("--ckpt_path", "last"),
)
MOMENTS: tuple[Moment, ...] = ("timer", "step", "write", "replace")


@pytest.fixture(autouse=True, scope="module")
def path_of_the_fork_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


class Whole:
    """A training that nobody killed: its preset, its weights and how long it took."""

    def __init__(self, folder: Path, model: str, *more: object) -> None:
        folder.mkdir()
        preset = folder / "preset.yaml"
        preset.write_text(PHANTOM.format(model=model))
        self.arguments = ["-c", preset, *OPTIONS, *more]
        fit_in_a_process(["--help"], folder / "none")  # the fork server starts
        start = time.monotonic()
        assert fit_in_a_process([*self.arguments, "--out", folder], folder / "steps") == 0
        self.seconds, self.folder = time.monotonic() - start, folder


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Trainings by name, each made once."""
    made: dict[str, Whole] = {}
    folder = tmp_path_factory.mktemp("whole")

    def whole(name: str) -> Whole:
        if name not in made:
            if name == "Classifier":
                made[name] = Whole(folder / name, TINY, "--last_every_n_steps", 2)
            else:
                network = whole("Classifier").folder / "best.ckpt"
                text = (SINGLE + FLIPPED if name == "Single" else DUO).format(network=network)
                made[name] = Whole(folder / name, text)
        return made[name]

    return whole


def weights(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def survives(whole: Whole, out: Path, moment: Moment, rng: random.Random, few: int | None) -> bool:
    """Whether a training that is killed at a random time or write ends as the whole one did."""
    arguments = [*whole.arguments, "--out", out]
    longest = {"step": EPOCHS * STEPS - 1, "write": 2 * EPOCHS, "replace": 2 * EPOCHS}
    count, delay = rng.randint(1, longest.get(moment, 1)), rng.uniform(0, whole.seconds)
    count = count if few is None else few
    out.mkdir()
    code = fit_in_a_process(arguments, out / "before", moment, count, delay)
    assert code == -9 or moment == "timer"
    before = steps_of(out / "before")
    assert fit_in_a_process(arguments, out / "after") == 0
    again = len(before) + len(steps_of(out / "after")) - EPOCHS * STEPS
    most = 2 if "--last_every_n_steps" in arguments else STEPS
    last = same_weights(whole.folder / "last.ckpt", out / "last.ckpt")
    best = same_weights(whole.folder / "best.ckpt", out / "best.ckpt")
    schedules = [
        torch.load(folder / "last.ckpt", weights_only=True)["lr_schedulers"]
        for folder in (whole.folder, out)
    ]
    last &= schedules[0] == schedules[1]
    return last and best and again <= most and not list(out.glob("*.part"))


def steps_of(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("Classifier", 1),
        ("Single", 1),
        pytest.param("Classifier", 8, marks=pytest.mark.slow),
        pytest.param("Single", 8, marks=pytest.mark.slow),
        pytest.param("Duo", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_training_ends_with_the_weights_of_a_whole_one(
    name: str, kills: int, wholes: Callable[[str], Whole], tmp_path: Path, tell_fault: TellFault
) -> None:
    rng, whole = random.Random(f"{name}{kills}"), wholes(name)
    few: dict[str, tuple[Moment, int]] = {"Classifier": ("step", STEPS + 4), "Single": ("write", 3)}
    moments = 2 * MOMENTS if kills > 1 else (few[name][0],)  # in the middle of an epoch, at its end
    survived = [
        survives(whole, tmp_path / f"{k}", moment, rng, few[name][1] if kills == 1 else None)
        for k, moment in enumerate(moments)
    ]
    tell_fault("kill -9 of training", kills, sum(survived))
    assert all(survived), list(zip(moments, survived, strict=True))


def tiny(train: Callable[..., None], out: Path, *more: object, model: str = TINY) -> None:
    """A training of 2 epochs of 4 steps in this process."""
    preset = out / "preset.yaml"
    preset.write_text(PHANTOM.format(model=model))
    options = ("--data.train", 16, "--logging", "csv", "--out", out)
    train("fit", "-c", preset, *options, *more)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_the_checkpoint_before(
    train: Callable[..., None],
    tmp_path: Path,
    tell_fault: TellFault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny(train, tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr("classifiers.whole.os.fsync", full)
    with pytest.raises(OSError, match=r"best\.ckpt' cannot be written \(No space left on device\)"):
        tiny(train, tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", 3)
    monkeypatch.undo()
    left = {path.name for path in tmp_path.glob("*.ckpt*")}
    intact = (tmp_path / "last.ckpt").read_bytes() == before
    tell_fault("disk full at a checkpoint", 1, int(intact and left == {"best.ckpt", "last.ckpt"}))
    assert intact
    assert left == {"best.ckpt", "last.ckpt"}
    tiny(train, tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", 3)


def test_limit_of_the_system_leaves_the_file_before(tmp_path: Path) -> None:
    path, limits = tmp_path / "a.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    with whole(path) as file:
        file.write(b"good")
    action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"), whole(path) as file:
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoints_are_not_loaded(
    train: Callable[..., None], tmp_path: Path, tell_fault: TellFault
) -> None:
    tiny(train, tmp_path)
    whole, rng, survived = (tmp_path / "last.ckpt").read_bytes(), random.Random(0), 0
    with zipfile.ZipFile(tmp_path / "last.ckpt") as file:  # bytes between its parts are padding
        largest = max(file.infolist(), key=lambda part: part.file_size)
        start = whole.index(file.read(largest))
    for k in range(20):
        damaged = bytearray(whole)
        if k % 2:
            damaged[rng.randrange(start, start + largest.file_size)] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        (tmp_path / "bad.ckpt").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "bad.ckpt")
        except ValueError as error:
            survived += "bad.ckpt' cannot be read" in str(error)
    tell_fault("damaged checkpoint", 20, survived)
    assert survived == 20
    with pytest.raises(ValueError, match=r"bad\.ckpt' cannot be read"):
        tiny(train, tmp_path, "--ckpt_path", tmp_path / "bad.ckpt")


@pytest.fixture
def bad_image(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a training image that holds a NaN."""
    read, name = Phantom.read, "train-00005"

    def reading(self: Phantom, record: Record) -> Sample:
        sample = read(self, record)
        if record.id == name:
            sample.image[0, 3, 3] = torch.nan
        return sample

    monkeypatch.setattr(Phantom, "read", reading)
    return name


def test_a_loss_that_is_not_finite_stops_with_its_term_and_image(
    train: Callable[..., None], tmp_path: Path, bad_image: str, tell_fault: TellFault
) -> None:
    with pytest.raises(ValueError, match="train/loss is not finite") as told:
        tiny(train, tmp_path, "--data.loading.in_memory", "false")
    named = re.match(r"step \d: train/loss is not finite, from images (.*); the", str(told.value))
    tell_fault("loss that is not finite", 1, int(bool(named and named[1] == bad_image)))
    assert named
    assert named[1] == bad_image


def test_a_step_that_is_not_finite_is_skipped(
    train: Callable[..., None], tmp_path: Path, bad_image: str, tell_fault: TellFault
) -> None:
    with pytest.warns(UserWarning, match=f"from images {bad_image}; the step is left out") as told:
        tiny(train, tmp_path, "--data.loading.in_memory", "false", "--on_nonfinite", "skip")
    state = weights(tmp_path / "last.ckpt")
    finite = all(bool(value.isfinite().all()) for value in state.values())  # running means, too
    optimizer = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    steps = {int(values["step"]) for values in optimizer["state"].values()}
    tell_fault("loss that is not finite", 1, int(finite and steps == {6}))
    assert finite
    assert steps == {6}  # of 8, one left out in each epoch
    assert sum("left out" in str(w.message) for w in told) == 2


@pytest.mark.parametrize("model", ["Single", "Duo", "SyCE"])
def test_a_term_or_gradient_of_an_explainer_that_is_not_finite(
    model: str,
    train: Callable[..., None],
    phantom_classifier: Path,
    tmp_path: Path,
    tell_fault: TellFault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = DUO if model == "Duo" else SINGLE.replace("explainers.Single", f"explainers.{model}")
    if model == "SyCE":
        text = text.replace("    convolutions: 1\n", "")
    text = text.format(network=phantom_classifier)
    constant = ("--model.optimisation.schedule", "constant")
    tiny(train, tmp_path, "--trainer.max_epochs", 1, *constant, model=text)
    good = (tmp_path / "last.ckpt").read_bytes()
    place = "cycle.distance" if model == "SyCE" else "similar_adversarial.total_variation"
    form = torch.tensor(torch.inf if model == "Duo" else torch.nan)
    monkeypatch.setattr(f"explainers.learned.{place}", lambda image, *_: form * image.sum())
    term = "train/symmetry, train/cycle" if model == "SyCE" else "train/variation"
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 2, "--trainer.num_sanity_val_steps", 0)
    with pytest.raises(ValueError, match=rf"step \d: {term}, train/loss is not finite") as told:
        tiny(train, tmp_path, *more, *constant, model=text)
    stands = (tmp_path / "last.ckpt").read_bytes() == good
    tell_fault("loss that is not finite", 1, int(stands))
    assert stands
    assert len(re.findall(r"train-\d+", str(told.value))) == 4  # the batch


def test_a_finished_schedule_is_not_extended(
    train: Callable[..., None], phantom_classifier: Path, tmp_path: Path
) -> None:
    model = SINGLE.format(network=phantom_classifier)
    tiny(train, tmp_path, model=model)
    more = ("--ckpt_path", "last", "--trainer.max_epochs")
    tiny(train, tmp_path, *more, 2, model=model)
    told = r"^the schedule .* planned for 8 steps, but 12 are asked for; keep max_epochs"
    with pytest.raises(ValueError, match=told):
        tiny(train, tmp_path, *more, 3, model=model)


def test_a_training_ended_by_sigterm_is_no_success(
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss = Classifier.loss

    def ended(self: Classifier, *given: Tensor) -> Tensor:
        if self.global_step == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *given)

    monkeypatch.setattr(Classifier, "loss", ended)
    with pytest.raises(SystemExit) as stop:
        tiny(train, tmp_path)
    assert stop.value.code == 143
    assert "stopped by SIGTERM; --ckpt_path last goes on" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    monkeypatch.undo()
    tiny(train, tmp_path, "--ckpt_path", "last")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_says_what_to_set(
    error: RuntimeError,
    train: Callable[..., None],
    tmp_path: Path,
    tell_fault: TellFault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("classifiers.classifier.Classifier.loss", fails)
    with pytest.raises(ValueError, match=r"^memory ran out: lower ") as told:
        tiny(train, tmp_path)
    options = ("batch_size", "accumulate_grad_batches", "precision", "--ckpt_path last")
    survived = all(option in str(told.value) for option in options)
    tell_fault("out of memory in training", 1, int(survived))
    assert survived


def test_memory_that_is_really_not_there(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifiers.classifier.Classifier.loss", lambda *_: torch.empty(2**50))
    with pytest.raises(ValueError, match=r"^memory ran out: lower "):
        tiny(train, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Classifier", "Single"])
def test_memory_and_handles_of_2000_steps(
    name: str,
    train: Callable[..., None],
    phantom_classifier: Path,
    tmp_path: Path,
    tell_fault: TellFault,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = TINY if name == "Classifier" else SINGLE.format(network=phantom_classifier)
    file = tmp_path / "growth.csv"
    tiny(
        *(train, tmp_path, "--data.train", 100, "--trainer.max_epochs", 80),
        *("--data.loading.workers", 1, "--trainer.callbacks+", "killed.Growth"),
        *("--trainer.callbacks.file", file),
        model=model,
    )
    step, kilobytes, handles, children = np.loadtxt(file, delimiter=",").T
    late = step > 500  # what is kept once has been kept by then
    slope = float(np.polyfit(step[late], kilobytes[late], 1)[0])
    with capsys.disabled():
        print(f"\n{name}: {slope:.3f} kB a step, {handles[-1]:.0f} handles, {step[-1]:.0f} steps")
    most = kilobytes[late][-1] - kilobytes[late][0]
    flat = handles[late].max() <= handles[late].min() and children.max() <= children.min()
    tell_fault("2,000 steps of training", 1, int(slope < 1 and flat and step[-1] == 2000))
    assert slope < 1, (slope, most)
    assert flat, (handles, children)
    assert step[-1] == 2000


def test_a_second_training_in_one_folder_is_refused(
    train: Callable[..., None], tmp_path: Path, tell_fault: TellFault
) -> None:
    with holding(tmp_path), pytest.raises(ValueError, match="another training writes to") as told:
        tiny(train, tmp_path)
    assert not (tmp_path / "last.ckpt").exists()
    tiny(train, tmp_path)  # the first was killed: the folder is free
    tell_fault("two trainings in one folder", 1, int(str(tmp_path) in str(told.value)))
    assert str(tmp_path) in str(told.value)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("train.fcntl.lockf", unable)
    with pytest.warns(UserWarning, match=r"cannot be locked \(\[Errno 37\] No locks available\)"):
        assert lock(tmp_path) is None
