"""DeepPCB in the layout of the public download, written at test time."""

from __future__ import annotations

import json
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datamodules.base import Loading, data_root
from datamodules.deeppcb import DeepPCB, find_window, parse_defects

CORNER = (150, 60)  # of every window that the fixture writes
FULL, SMALL = Loading(size=320), Loading(size=16)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def committed() -> pd.DataFrame:
    with (files("datamodules") / "split_ids" / "deeppcb.csv").open() as file:
        return pd.read_csv(file, dtype=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The download's tree: grey boards, black left of x = 160 in the tested ones."""
    root = tmp_path_factory.mktemp("data") / "PCBData"
    board = np.full((640, 640), 230, np.uint8)
    template = jpeg(board)
    board[:, :160] = 20
    tested = jpeg(board)
    left, top = CORNER
    for row in committed().itertuples():
        number = str(row.group).removeprefix("group")
        images, notes = root / str(row.group) / number, root / str(row.group) / f"{number}_not"
        images.mkdir(parents=True, exist_ok=True)
        notes.mkdir(exist_ok=True)
        (images / f"{row.pair}_test.jpg").write_bytes(tested)
        (images / f"{row.pair}_temp.jpg").write_bytes(template)
        boxes = [[int(cell) for cell in box.split()] for box in str(row.window).split(";")]
        lines = [f"{a + left} {b + top} {c + left} {d + top} {k}" for a, b, c, d, k in boxes]
        (notes / f"{row.pair}.txt").write_text("\n".join(["1 1 9 9 6", *lines]) + "\n")
    return root


def test_counts_and_columns(folder: Path) -> None:
    data = DeepPCB(str(folder), loading=SMALL)
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [1762, 410, 824]
    tested, template = data.records()[:2]
    assert (tested.id, tested.label, template.id, template.label) == (
        "20085000_test",
        1,
        "20085000_temp",
        0,
    )
    assert tested.columns["counterpart"] == template.id
    assert json.loads(tested.columns["types"]) == ["mousebite", "mousebite", "pin-hole", "spur"]
    assert template.columns["types"] == ""
    assert tested.group == template.group == "group20085"


def test_window_is_cut_and_binarised(folder: Path) -> None:
    data = DeepPCB(str(folder), loading=FULL)
    tested, template = (data.read(record) for record in data.records()[:2])
    expected = torch.ones(1, 320, 320)
    expected[:, :, : 160 - CORNER[0]] = 0
    assert torch.equal(tested.image, expected)
    assert torch.equal(template.image, torch.ones(1, 320, 320))
    assert template.mask is None
    mask = torch.zeros(320, 320, dtype=torch.bool)
    for x0, y0, x1, y1 in (
        (217, 138, 243, 166),
        (83, 127, 127, 161),
        (146, 263, 172, 287),
        (284, 204, 310, 225),
    ):
        mask[y0:y1, x0:x1] = True
    assert tested.mask is not None
    assert torch.equal(tested.mask, mask)


def test_whole_area_holds_every_box(folder: Path) -> None:
    data = DeepPCB(str(folder), "whole", loading=Loading(size=640))
    record = data.records()[0]
    sample = data.read(record)
    assert json.loads(record.columns["types"])[0] == "pin-hole"
    assert sample.mask is not None
    assert sample.mask[1:9, 1:9].all()
    assert not sample.mask[0].any()
    assert 0.85 < float(sample.image.max()) < 1  # as it is, not binarised


def test_split_windows_and_groups_are_those_of_the_prepared_table(folder: Path) -> None:
    table = data_root() / "deeppcb" / "labels.csv"
    if not table.is_file():
        pytest.skip(f"needs {table}")
    frame = pd.read_csv(table, keep_default_na=False)
    data = DeepPCB(str(folder), loading=SMALL)
    records = data.records()
    names = {"test": "defect", "temp": "normal"}
    images = [
        f"images/{pair}_{names[kind]}.png" for pair, kind in (r.id.split("_") for r in records)
    ]
    assert images == frame["image"].tolist()
    assert [record.split for record in records] == frame["split"].tolist()
    assert [record.columns["types"] for record in records] == frame["types"].tolist()
    boxes = [[list(d[:4]) for d in data.pairs[r.columns["pair"]].defects] for r in records[::2]]
    assert boxes == [json.loads(text) for text in frame["boxes"][::2]]


def test_window_of_a_real_annotation() -> None:
    # Two lines of 00041_not/00041000.txt that lie in the pair's window, and one that does not.
    lines = ["466 441 493 470 3", "454 300 493 396 2", "539 259 592 316 1"]
    window = committed().set_index("pair").loc["00041000", "window"]
    inside = parse_defects(str(window).split(";"), "window")[:2]
    assert find_window(parse_defects(lines, "file"), inside, "file") == (192, 160)


@pytest.mark.parametrize("line", ["1 2 3", "5 5 4 9 1", "0 0 9 641 1", "0 0 9 9 7", "a b c d e"])
def test_broken_annotations_name_the_line(line: str) -> None:
    with pytest.raises(ValueError, match=f"file, line 3: must be .* but got '{line}'"):
        parse_defects(["1,2,3,4,5", "", line], "file")


def test_broken_downloads_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"20085000\.txt is missing; unpack the download"):
        DeepPCB(str(tmp_path)).records()
    with pytest.raises(ValueError, match="do not hold the committed window; use area: whole"):
        find_window([(0, 0, 9, 9, 1)], [(0, 0, 9, 9, 2)], "file")
    data = DeepPCB(str(folder), loading=SMALL)
    record = data.records()[2]
    path = folder / "group20085" / "20085" / f"{record.id}.jpg"
    path.write_bytes(jpeg(np.zeros((640, 600), np.uint8)))
    with pytest.raises(ValueError, match=r"must have 640 x 640 pixels, but has \(640, 600\)"):
        data.read(record)
