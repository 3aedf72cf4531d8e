"""Tables read as they are, and every broken table told in one sentence with line and value."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datamodules.base import Loading, collate, data_root
from datamodules.image_table import ImageTable
from datamodules.images import boxes_to_mask

SMALL = Loading(size=8, batch_size=2)
LESION = {"normal": ["normal"], "lesion": ["benign", "malignant"]}


def write(folder: Path, *lines: str) -> str:
    """Write a table and two images of 8 x 16 pixels, a.png black and b.png white."""
    for name, value in (("a.png", 0), ("b.png", 255)):
        Image.new("L", (16, 8), value).save(folder / name)
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "table.csv")


def real(table: str) -> str:
    if not (data_root() / table).is_file():
        pytest.skip(f"needs {data_root() / table}")
    return table


def test_records_by_hand(tmp_path: Path) -> None:
    lines = ["image,label,split,group,age", "b.png,sick,test,p1,61", "a.png,well,train,p2,"]
    data = ImageTable(write(tmp_path, *lines), classes=["well", "sick"], loading=SMALL)
    first, second = data.records()
    assert (first.id, first.label, first.split, first.group) == ("b.png", 1, "test", "p1")
    assert second.columns == {"label": "well", "group": "p2", "age": ""}
    assert data.read(first).mask is None
    assert_close(data.read(first).image, torch.ones(1, 8, 8))


def test_evidence_of_the_first_class_alone_is_told(tmp_path: Path) -> None:
    table = write(tmp_path, "image,label,boxes", 'a.png,bad,"[[0, 0, 8, 8]]"', "b.png,fine,")
    with pytest.warns(UserWarning, match="only images of 'bad' have evidence, but the first class"):
        ImageTable(table, loading=SMALL).records()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageTable(table, classes=["fine", "bad"], loading=SMALL).records()


def test_id_and_group_columns_and_sorted_classes(tmp_path: Path) -> None:
    lines = ["\ufeffid,image,label,patient", "x,b.png,sick,p1", "y,b.png,back,p1"]  # Excel's mark
    data = ImageTable(write(tmp_path, *lines), group="patient", loading=SMALL)
    assert data.class_names == ("back", "sick")
    assert [(r.id, r.label, r.group) for r in data.records()] == [("x", 1, "p1"), ("y", 0, "p1")]


def test_mask_goes_before_boxes(tmp_path: Path) -> None:
    mask = np.zeros((8, 16), np.uint8)
    mask[:4] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = ('a.png,s,m.png,"[[0, 0, 16, 8]]"', 'b.png,s,,"[[0, 0, 8, 8]]"')
    table = write(tmp_path, "image,label,mask,boxes", *rows)
    data = ImageTable(table, classes=["s"], loading=SMALL)
    by_mask, by_boxes = (data.read(record).mask for record in data.records())
    assert by_mask is not None
    assert by_boxes is not None
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4] = True
    assert torch.equal(by_mask, expected)
    assert torch.equal(by_boxes, expected.T)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("image,label", "c.png,s", r"line 3: column 'image' names .*c\.png, which is not a file"),
        ("image,label", "b.png,odd", "line 3: label 'odd' is unknown; the known ones are s"),
        ("image,label", "a.png,s", r"line 3: image 'a\.png' is listed twice, first in .*line 2"),
        ("image,label", "b.png,s,x", "line 3: there are more cells than the 2 columns"),
        ("image,class", "b.png,s", "column 'label' is missing; it has image, class"),
        ("image,label,split", "b.png,s,dev", "line 3: split must be .* but got 'dev'"),
        ("image,label,mask", "b.png,s,m.png", r"line 3: column 'mask' names .*m\.png"),
        ("image,label,boxes", "b.png,s,[[1", r"line 3: boxes must be .* but got '\[\[1'"),
        ("image,label,boxes", "b.png,s,7", "line 3: boxes must be a JSON list"),
        ("image,label,boxes", 'b.png,s,"[[1,2,3]]"', "line 3: boxes must be a JSON list"),
        ("image,label,boxes", 'b.png,s,"[[NaN,0,2,2]]"', r"line 3: box \[nan, 0.0, 2.0, 2.0\]"),
        ("image,label,boxes", 'b.png,s,"[[5,0,2,2]]"', r"line 3: box \[5.0, 0.0, 2.0, 2.0\] must"),
        (
            "image,label,boxes",
            'b.png,s,"[[0,0,Infinity,2]]"',
            r"line 3: box \[0.0, 0.0, inf, 2.0\] must",
        ),
        (
            "image,label,boxes",
            'b.png,s,"[[-1,0,2,2]]"',
            r"line 3: box \[-1.0, 0.0, 2.0, 2.0\] must",
        ),
    ],
)
def test_broken_rows_name_line_and_value(
    tmp_path: Path, header: str, row: str, message: str
) -> None:
    empty = "," * (header.count(",") - 1)
    table = write(tmp_path, header, f"a.png,s{empty}", row)
    with pytest.raises(ValueError, match=message):
        ImageTable(table, classes=["s"], loading=SMALL).records()


def test_line_numbers_count_lines_of_the_file(tmp_path: Path) -> None:
    table = write(tmp_path, "image,label,note", 'a.png,s,"two', 'lines"', "", "b.png,odd,")
    with pytest.raises(ValueError, match="line 5: label 'odd'"):
        ImageTable(table, classes=["s"]).records()


def test_faults_found_at_reading_name_the_line(tmp_path: Path) -> None:
    Image.new("1", (8, 16)).save(tmp_path / "turned.png")
    (tmp_path / "text.png").write_text("no image")
    table = write(
        tmp_path,
        "id,image,label,mask,boxes",
        'wide,a.png,s,,"[[0, 0, 17, 8]]"',
        "turned,a.png,s,turned.png,",
        "text,text.png,s,,",
    )
    data = ImageTable(table, classes=["s"], loading=SMALL)
    messages = (
        r"line 2: box \[0.0, 0.0, 17.0, 8.0\] must lie inside the image, which is 16 pixels wide",
        r"line 3: mask .*turned\.png must have the image's size 8 x 16, but has 16 x 8",
        r"line 4: Image .*text\.png cannot be read",
    )
    for record, message in zip(data.records(), messages, strict=True):
        with pytest.raises(ValueError, match=message):
            data.read(record)


def test_missing_table_and_group(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Table .*none\.csv does not exist"):
        ImageTable(str(tmp_path / "none.csv"), classes=["s"]).records()
    table = write(tmp_path, "image,label", "a.png,s")
    with pytest.raises(ValueError, match="no group column 'board', only image, label"):
        ImageTable(table, classes=["s"], group="board").records()


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    table = write(tmp_path, "image,label,split", "a.png,s,train", "b.png,s,test")
    with pytest.raises(ValueError, match=r"'val' .*is empty"):
        ImageTable(table, classes=["s"], loading=SMALL).setup()


def test_busi_as_it_is() -> None:
    table = real("busi/labels.csv")
    data = ImageTable(table, LESION, group="dup_group", loading=Loading(size=32, batch_size=64))
    data.setup()
    assert {split: len(found) for split, found in data.splits.items()} == {
        "train": 545,
        "val": 85,
        "test": 150,
    }
    frame = pd.read_csv(data_root() / table)
    expected = frame[frame["split"] == "val"]
    batches = list(data.val_dataloader())
    has_mask = torch.cat([batch["has_mask"] for batch in batches])
    assert torch.equal(torch.cat([batch["label"] for batch in batches]) == 1, has_mask)
    assert int(has_mask.sum()) == (expected["label"] != "normal").sum()
    share = torch.cat([batch["mask"] for batch in batches]).float().mean((1, 2))
    assert_close(share, torch.tensor(expected["mask_frac"].tolist()), atol=0.02, rtol=0)
    three = ImageTable(table, ["normal", "benign", "malignant"], loading=SMALL).records()
    assert np.bincount([record.label for record in three]).tolist() == [133, 437, 210]


def test_deeppcb_as_it_is() -> None:
    table = real("deeppcb/labels.csv")
    data = ImageTable(table, ["normal", "defect"], loading=Loading(size=320))
    data.setup()
    assert {split: len(found) for split, found in data.splits.items()} == {
        "train": 1762,
        "val": 410,
        "test": 824,
    }
    row = pd.read_csv(data_root() / table).iloc[0]
    sample = data.read(data.records()[0])
    assert sample.mask is not None
    boxes = [tuple(box) for box in json.loads(row["boxes"])]
    assert torch.equal(sample.mask, boxes_to_mask(boxes, 320, 320, 320))
    assert set(sample.image.flatten().tolist()) == {0.0, 1.0}  # 1-bit file at its own size
    assert data.read(data.records()[1]).mask is None


def test_cross_validation_keeps_near_duplicates_together() -> None:
    table = real("busi/labels.csv")
    homes: dict[str, set[int]] = {}
    for fold in range(3):
        data = ImageTable(table, LESION, group="dup_group", loading=SMALL, fold=fold, folds=3)
        data.setup()
        for record in data.splits["test"]:
            homes.setdefault(record.group or record.id, set()).add(fold)
    assert all(len(found) == 1 for found in homes.values())
    assert len(homes) == 780 - 274 + 122


def test_features_have_masks_of_their_own(tmp_path: Path) -> None:
    """Their union is the evidence; a missing one is empty in the batch."""
    for name, rows in (("net", slice(0, 2)), ("dots", slice(6, 8))):
        mask = np.zeros((8, 16), np.uint8)
        mask[rows] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    lines = ["1,a.png,n,,", "2,a.png,s,net.png,dots.png", "3,a.png,s,,dots.png"]
    table = write(tmp_path, "id,image,label,mask_net,mask_dots", *lines)
    data = ImageTable(table, ["n", "s"], features=["net", "dots"], loading=SMALL)
    batch = collate([(r, data.read(r)) for r in data.records()], data.feature_names)
    assert batch["features"].shape == (3, 2, 8, 8)
    assert batch["features"].flatten(2).sum(2).tolist() == [[0, 0], [16, 16], [0, 16]]
    assert batch["mask"].equal(batch["features"].any(1))
    assert batch["has_mask"].tolist() == [False, True, True]
    assert list(batch["columns"]) == ["label"]
    with pytest.raises(ValueError, match="column 'mask_streaks' is missing"):
        ImageTable(table, ["n", "s"], features=["streaks"]).records()


def test_levels_of_relevance(tmp_path: Path) -> None:
    """A layer map: background 0, epidermis 100, lesion 200."""
    layers = np.zeros((8, 16), np.uint8)
    layers[2:4], layers[4:, 8:] = 100, 200
    Image.fromarray(layers).save(tmp_path / "layers.png")
    rows = ("a.png,s,layers.png", "b.png,s,")
    table = write(tmp_path, "image,label,importance", *rows)
    levels = {0: -1, 100: 1, 200: 3}
    data = ImageTable(table, classes=["s"], levels=levels, loading=Loading(size=4))
    layered, plain = (data.read(record) for record in data.records())
    assert layered.importance is not None
    assert layered.importance.tolist() == [[-1] * 4, [1] * 4, [-1, -1, 3, 3], [-1, -1, 3, 3]]
    assert layered.mask is not None
    assert layered.mask.equal(layered.importance == 3)
    assert plain.importance is None
    assert plain.mask is None
    fewer = ImageTable(table, classes=["s"], levels={0: -1, 200: 3}, loading=SMALL)
    with pytest.raises(ValueError, match=r"line 2: levels have no relevance for the values \[100"):
        fewer.read(fewer.records()[0])


def test_files_may_lie_in_a_folder(tmp_path: Path) -> None:
    table = write(tmp_path, "image,label", "a.png,s")
    (tmp_path / "files").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "files" / "a.png")
    assert len(ImageTable(table, classes=["s"], folder="files").records()) == 1
    with pytest.raises(ValueError, match=r"line 2: column 'image' names .*a\.png, which is not"):
        ImageTable(table, classes=["s"]).records()
