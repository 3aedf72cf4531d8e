"""An archive's explanation that is killed at any moment, and one that takes long."""

from __future__ import annotations

import multiprocessing
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed import held
from PIL import Image
from torch import Tensor

from benchmarks.archive import write_shards
from explainers.__main__ import main
from explainers.inference import Answer
from explainers.inference import archive as explaining
from explainers.inference.archive import explain_shards
from explainers.inference.explain import Model

SHARDS, PICTURES = 6, 20


def bright(image: Tensor) -> Answer:
    """The image itself is the map; bright ones are ill."""
    time.sleep(0.002)  # what a network would take
    share = image.mean((1, 2, 3))
    probability = torch.stack([1 - share, share], 1)
    return Answer(probability, probability.argmax(1), image, image, image.mean(1))


def explained(folder: Path, out: str) -> None:
    torch.set_num_threads(1)
    model = Model(bright, 16, 1, ["well", "ill"])
    explain_shards(model, [str(folder / "*.tar")], folder / out, batch_size=4, keep_maps=True)


def rows(folder: Path) -> pd.DataFrame:
    parts = sorted(folder.glob("*.parquet"))
    return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Shards, what they give undisturbed, and how long that takes."""
    folder = tmp_path_factory.mktemp("archive")
    numbers = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for k in range(PICTURES):
                buffer = BytesIO()
                Image.fromarray(numbers.integers(0, 256, (24, 24), np.uint8)).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{shard}-{k}.png")
                info.size = buffer.tell()
                tar.addfile(info, BytesIO(buffer.getvalue()))
    explained(folder, "warm")
    start = time.perf_counter()
    explained(folder, "whole")
    return folder, time.perf_counter() - start


@pytest.mark.faults
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_every_row_once(
    archive: tuple[Path, float],
    kills: int,
    tell_fault: Callable[[str, int, int], None],
    tmp_path: Path,
) -> None:
    folder, seconds = archive
    numbers, expected, survived = random.Random(kills), rows(folder / "whole"), 0
    started = multiprocessing.get_context("fork")
    for kill in range(kills):
        out = str(tmp_path / str(kill))
        process = started.Process(target=explained, args=(folder, out))
        process.start()
        time.sleep(numbers.uniform(0, 1.2 * seconds))
        process.kill()
        process.join()
        left = {path: path.stat().st_mtime_ns for path in Path(out).glob("*.parquet")}
        try:
            explained(folder, out)
            same = rows(Path(out)).equals(expected)
        except (ValueError, OSError):
            same = False
        kept = all(path.stat().st_mtime_ns == then for path, then in left.items())
        survived += same and kept
    tell_fault("kill -9 while an archive is explained", kills, survived)
    assert survived == kills


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """Images that were explained so far, and what the process holds, after every 200th."""
    explained, noted, seen = explaining.explained, list[tuple[int, int, int, int]](), 0

    def noting(model: Model, part: explaining.Part, *more: Any) -> Iterator[explaining.Line]:
        nonlocal seen
        yield from explained(model, part, *more)
        seen += len(part.lines)
        if part.lines and seen % 200 == 0:
            noted.append((seen, *held()))

    monkeypatch.setattr(explaining, "explained", noting)
    return noted


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_handles_and_workers_of_10000_images(
    workers: int,
    growth: list[tuple[int, int, int, int]],
    phantom_single: Path,
    tell_fault: Callable[[str, int, int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(tmp_path, size=32, images=1000, count=10)  # ten names of one file
    command = ["explain", str(phantom_single), "--accelerator", "cpu", "--workers", str(workers)]
    main([*command, str(tmp_path / "000000.tar"), "-o", str(tmp_path / "warm")])
    growth.clear()  # what is kept once has been kept by now
    before = held()
    main([*command, str(tmp_path / "*.tar"), "-o", str(tmp_path / "out"), "--keep_maps", "true"])
    after, count = held(), len(rows(tmp_path / "out"))
    images, kilobytes, handles, children = np.array(growth).T
    late = images > images[0] + 2000
    slope = float(np.polyfit(images[late], kilobytes[late], 1)[0])
    with capsys.disabled():
        print(f"\n{workers} workers: {slope:.4f} kB an image, {after[1]} handles, {count} images")
    closed = after[1] <= before[1] and handles[late].max() <= handles[~late].max()
    ended = children.max() == workers and after[2] == 0
    flat = slope < 0.5 and closed and ended  # a map alone is 4 kB
    tell_fault("10,000 explained images", 1, int(flat and count == 10000))
    assert slope < 0.5, kilobytes
    assert closed, (before, handles, after)
    assert ended, (children, after)
    assert count == 10000
