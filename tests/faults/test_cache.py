"""The cache of decoded images: killed at any moment, two processes at once, a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from files import write_dicom
from numpy.typing import NDArray
from torch import Tensor

from datamodules import decoded as cache
from datamodules.base import Loading
from datamodules.decoded import decode_all, facts_file, growing_file, unreadable
from datamodules.images import read_image, resize_image
from datamodules.rsna import RSNAPneumonia

pytestmark = pytest.mark.faults

SIZE = 16
Tell = Callable[[str, int, int], None]


def files(folder: Path, count: int) -> dict[str, Path]:
    paths = {str(index): folder / "files" / f"{index}.dcm" for index in range(count)}
    for index, path in enumerate(paths.values()):
        noise = np.random.default_rng(index).integers(0, 256, (20, 24), dtype=np.uint8)
        write_dicom(path, noise)
    return paths


def child(work: Callable[[], object]) -> int:
    """Start another process; its exit status is 1 if the work fails."""
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def status(pid: int) -> int:
    """As a shell tells it: negative where a signal ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def logged(monkeypatch: pytest.MonkeyPatch, log: Path, seconds: float = 0.0) -> None:
    """From here on each file that is decoded is a line of the log, and takes a while."""

    def read(path: Path, channels: Literal[1, 3]) -> Tensor:
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{path.stem}\n")
        return read_image(path, channels)

    monkeypatch.setattr(cache, "read_image", read)


def at_once(paths: dict[str, Path]) -> NDArray[np.uint8]:
    """What decoding in one go gives."""
    images = [resize_image(read_image(path, 1), SIZE)[0] for path in paths.values()]
    return (torch.stack(images) * 255).round().to(torch.uint8).numpy()


def whole(target: Path, expected: NDArray[np.uint8]) -> bool:
    """Whether a cache holds these images with their checksums, and nothing lies beside it."""
    facts = np.load(facts_file(target))
    checksums = [zlib.crc32(image.tobytes()) for image in expected]
    same = np.array_equal(np.load(target), expected) and facts[:, 2].tolist() == checksums
    left = {path.name for path in target.parent.iterdir()}
    return same and left == {f"{target.stem}{end}" for end in (".npy", ".facts.npy", ".json")}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments(
    kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell_fault: Tell
) -> None:
    paths = files(tmp_path, 5 * kills)
    target, log = tmp_path / "cache" / "all.npy", tmp_path / "log"
    generator, survived = np.random.default_rng(kills), 0
    with monkeypatch.context() as patch:
        logged(patch, log, 0.02)
        for _ in range(kills):
            pid = child(lambda: decode_all(paths, SIZE, 0, target))
            time.sleep(0.05 + 0.1 * generator.random())
            os.kill(pid, signal.SIGKILL)
            survived += status(pid) in {-signal.SIGKILL, 0}
        decode_all(paths, SIZE, 0, target)
    decoded = log.read_text().split()
    good = whole(target, at_once(paths)) and set(decoded) == set(paths)
    good = good and len(decoded) <= len(paths) + kills  # only what a kill met is decoded again
    tell_fault("kill -9 of the decode cache, at random", kills, survived if good else 0)
    assert good
    assert survived == kills


class Killed(Exception):
    """Not raised: the process is gone."""


def killing(at: int, half: bool) -> Callable[[], None]:
    """Patch every call that changes a file: the one numbered ``at`` kills, done, half or not."""
    count = 0

    def patched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and half and name == "pwrite":
                descriptor, content, place = arguments
                original(descriptor, content[: len(content) // 2], place)
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("posix_fallocate", "pwrite", "replace", "fsync"):
        setattr(os, name, patched(name, getattr(os, name)))


@pytest.mark.parametrize("half", [False, True])
def test_kill_at_every_step(half: bool, tmp_path: Path, tell_fault: Tell) -> None:
    """Behind each call that changes a file, or halfway through where it writes pixels or facts."""
    paths = files(tmp_path, 3)
    expected = at_once(paths)

    def decode(at: int) -> None:
        killing(at, half)
        decode_all(paths, SIZE, 0, tmp_path / str(at) / "all.npy")

    tried = survived = 0
    while status(child(partial(decode, tried + 1))) == -signal.SIGKILL:
        tried += 1
        target = tmp_path / str(tried) / "all.npy"
        decode_all(paths, SIZE, 0, target)
        survived += whole(target, expected)
    tell_fault("kill -9 of the decode cache, at every step", tried, survived)
    assert tried >= 12
    assert survived == tried


def test_kill_with_workers(tmp_path: Path, tell_fault: Tell) -> None:
    """The lock goes with the process, and with its workers when they see that it is gone."""
    paths = files(tmp_path, 12)
    target = tmp_path / "cache" / "all.npy"
    pid = child(lambda: decode_all(paths, SIZE, 2, target))
    while not growing_file(target).exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    status(pid)
    decode_all(paths, SIZE, 0, target)
    good = whole(target, at_once(paths))
    tell_fault("kill -9 of the decode cache, with workers", 1, good)
    assert good


def test_facts_that_lie_are_found(tmp_path: Path) -> None:
    """After a power cut facts may be on the disk and their pixels not."""
    paths = files(tmp_path, 4)
    target = tmp_path / "cache" / "all.npy"
    decode_all(paths, SIZE, 0, target)
    os.replace(target, growing_file(target))
    pixels = np.load(growing_file(target), "r+")
    pixels[2] = 0
    pixels.flush()
    decode_all(paths, SIZE, 0, target)
    assert whole(target, at_once(paths))


def test_two_processes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell_fault: Tell
) -> None:
    """The second one waits, and decodes nothing."""
    paths = files(tmp_path, 20)
    target, log = tmp_path / "cache" / "all.npy", tmp_path / "log"
    with monkeypatch.context() as patch:
        logged(patch, log, 0.02)
        both = [child(lambda: decode_all(paths, SIZE, 0, target)) for _ in range(3)]
        ended = [status(pid) for pid in both]
    decoded = log.read_text().split()
    good = ended == [0, 0, 0] and sorted(decoded) == sorted(paths) and whole(target, at_once(paths))
    tell_fault("two processes on one decode cache", 1, good)
    assert good


@pytest.mark.parametrize("room", [0.0, 0.6])
def test_disk_full(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell_fault: Tell
) -> None:
    """Told before anything is decoded, or halfway on a disk that promises room and has none."""
    paths = files(tmp_path, 10)
    target, log = tmp_path / "cache" / "all.npy", tmp_path / "log"
    told, most = tmp_path / "told", int(room * 10 * SIZE**2)

    allocate = os.posix_fallocate

    def limited(*arguments: int) -> None:
        allocate(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def full() -> None:
        if room:
            os.posix_fallocate = limited
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            decode_all(paths, SIZE, 0, target)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            told.write_text(str(error))

    with monkeypatch.context() as patch:
        logged(patch, log)
        assert status(child(full)) == 0
    sentence = told.read_text()
    before = log.read_text().split() if log.exists() else []
    with monkeypatch.context() as patch:
        logged(patch, log)
        decode_all(paths, SIZE, 0, target)
    good = whole(target, at_once(paths))
    tell_fault("disk full while the decode cache is written", 1, good)
    assert sentence.startswith(f"Cache {target} cannot be written ({os.strerror(errno.EFBIG)}):")
    assert sentence.endswith("what was decoded is kept.")
    assert good
    assert bool(before) == bool(room)
    assert len(log.read_text().split()) == 10 + bool(room)  # one alone is decoded again


def test_bad_images_are_skipped_or_refused(tmp_path: Path, tell_fault: Tell) -> None:
    paths = files(tmp_path, 6)
    for name in "14":
        paths[name].write_bytes(paths[name].read_bytes()[:-200])
    target = tmp_path / "cache" / "all.npy"
    with pytest.raises(ValueError, match=r"Image .*1\.dcm cannot be read: [^\n]+\.$"):
        decode_all(paths, SIZE, 0, target)
    assert not target.exists()
    decode_all(paths, SIZE, 0, target, on_bad_image="skip")
    assert list(unreadable(target)) == ["1", "4"]
    assert np.load(facts_file(target))[:, 0].tolist() == [20, 0, 20, 20, 0, 20]
    with pytest.raises(ValueError, match=r"Image .*1\.dcm cannot be read"):
        decode_all(paths, SIZE, 0, target)  # by this policy the cache is not finished
    for name in "14":
        write_dicom(paths[name], np.full((20, 24), 9, np.uint8))
    decode_all(paths, SIZE, 0, target)
    good = (
        whole(target, at_once(paths))
        and json.loads(target.with_suffix(".json").read_text())["unreadable"] == {}
    )
    tell_fault("bad images in the decode cache", 2, 2 * good)
    assert good


def test_a_data_set_leaves_bad_images_out(tmp_path: Path) -> None:
    """Without reading the files again; the sentence is that of the first time."""
    rows = ["patientId,x,y,width,height,Target"]
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(["train", "val", "test"] * 2):
        exam = f"exam-{index}"
        write_dicom(
            tmp_path / "stage_2_train_images" / f"{exam}.dcm", np.full((20, 24), 9, np.uint8)
        )
        rows.append(f"{exam},,,,,0")
        split[name].append(exam)
    (tmp_path / "stage_2_train_images" / "exam-3.dcm").write_bytes(b"no image")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "authors_split.json").write_text(json.dumps(split))
    for _ in range(2):
        data = RSNAPneumonia(str(tmp_path), loading=Loading(16, 1, 2, on_bad_image="skip"))
        data.prepare_data()
        with pytest.warns(UserWarning, match=r"^Left out: Image .*exam-3\.dcm cannot be read"):
            data.setup()
        assert [len(members) for members in data.splits.values()] == [1, 2, 2]
        assert list(data.skipped) == ["exam-3"]
        assert len(list(data.loader("train"))) == 1
