"""Images in tar shards, and what is said of shards that cannot be used."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageTable, Shards
from datamodules.base import Loading

Files = dict[str, bytes]


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))


def sample(name: str, value: int, **facts: str) -> Files:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    files = {f"{name}.png": png(np.full((8, 8), value, np.uint8))}
    files[f"{name}.json"] = json.dumps(facts).encode()
    return files | ({f"{name}.mask.png": png(mask)} if facts.get("label") == "ill" else {})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of six images, three splits, and the same as a table."""
    monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
    lines = ["image,label,mask,split,group,age"]
    for shard in range(2):
        files: Files = {}
        for k in range(6):
            split, label = ("train", "val", "test")[k // 2], ("well", "ill")[k % 2]
            name, patient = f"scans/{shard}{k}", f"p{shard}{k // 2}"
            own = sample(name, 40 * k, label=label, split=split, group=patient, age=str(k))
            for one, content in own.items():
                if one.endswith(".png"):
                    path = tmp_path / "table" / one
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            mask = f"{name}.mask.png" if label == "ill" else ""
            lines.append(f"{name}.png,{label},{mask},{split},{patient},{k}")
            files |= own
        write_tar(tmp_path / "archive" / f"{shard}.tar", files)
    (tmp_path / "table" / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def shards(pattern: str = "archive/*.tar", **loading: object) -> Shards:
    options = {"size": 4, "batch_size": 3, **loading}
    return Shards(pattern, ["well", "ill"], Loading(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_give_what_the_files_of_a_table_give(root: Path, workers: int) -> None:
    table = ImageTable("table/labels.csv", ["well", "ill"], loading=Loading(4, batch_size=3))
    for split in ("train", "val", "test"):
        archived = list(shards(workers=workers, in_memory=False).loader(split))
        for one, two in zip(archived, table.loader(split), strict=True):
            for key in ("image", "mask", "label", "has_mask"):
                assert torch.equal(one[key], two[key])
            assert [f"{name}.png" for name in one["id"]] == two["id"]
            assert one["columns"]["age"] == two["columns"]["age"]
    assert one["has_mask"].any()
    groups = {record.group for record in shards().dataset("train").records}
    assert groups == {"p00", "p10"}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.json": b'{"label": "ill"}'}, "sample 'a': there is no image, only json"),
        ({"a.png": b""}, "sample 'a': there is no a.json, which tells its label"),
        ({"a.png": b"", "a.json": b"{"}, "a.json must hold a JSON object"),
        ({"a.png": b"", "a.json": b"7"}, "a.json must hold a JSON object"),
        (sample("a", 1, label="sick"), "label 'sick' is unknown; the known ones are well, ill"),
        (sample("a", 1, label="ill", split="new"), "split must be train, val, test or empty"),
    ],
)
def test_samples_that_break_a_rule(root: Path, files: Files, told: str) -> None:
    write_tar(root / "bad" / "0.tar", files)
    with pytest.raises(ValueError, match=told):
        shards("bad/*.tar").records()


def test_what_else_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"No shard is at .*nope.*; set SIMADV_DATA"):
        shards("nope/*.tar").records()
    (root / "twice").mkdir()
    for name in "ab":
        (root / "twice" / f"{name}.tar").write_bytes((root / "archive" / "0.tar").read_bytes())
    with pytest.raises(ValueError, match=r"scans/00\.png is there twice"):
        shards("twice/*.tar").records()
    odd = sample("a", 1, label="ill") | {"a.mask.png": png(np.zeros((4, 8), np.uint8))}
    write_tar(root / "odd" / "0.tar", odd)
    module = shards("odd/*.tar")
    with pytest.raises(ValueError, match=r"mask a\.mask\.png must have the image's size \(8, 8\)"):
        module.read(module.records()[0])
    write_tar(root / "broken" / "0.tar", sample("a", 1, label="ill") | {"a.png": b"no image"})
    module = shards("broken/*.tar")
    with pytest.raises(ValueError, match=r"0\.tar/a\.png cannot be read"):
        module.read(module.records()[0])


@pytest.mark.parametrize("left", [512, 1536, 2000])
def test_a_shard_that_was_cut_off_is_refused(root: Path, left: int) -> None:
    whole = (root / "archive" / "0.tar").read_bytes()
    (root / "cut").mkdir()
    (root / "cut" / "0.tar").write_bytes(whole[:left])
    with pytest.raises(ValueError, match=r"0\.tar has no end mark, as one that was cut off"):
        shards("cut/*.tar").records()
