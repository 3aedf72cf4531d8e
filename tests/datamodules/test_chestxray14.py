"""ChestX-ray14 in the layout of its download, written at test time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from files import write_image

from datamodules import ChestXray14
from datamodules.base import Loading

HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
SMALL = Loading(size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 patients of two images each: nothing, effusion (every third), hernia (every sixth)."""
    lines, names = [HEAD], []
    for patient in range(1, 25):
        finding = "Effusion|Hernia" if patient % 6 == 0 else "Hernia"
        finding = finding if patient % 3 == 0 else "No Finding"
        for visit in range(2):
            name = f"{patient:08d}_{visit:03d}.png"
            names.append(name)
            lines.append(f"{name},{finding},{visit},{patient},058Y,F,PA,2000,2500,0.1,0.1,\n")
            part = f"images_{1 + patient // 13:03d}"
            write_image(tmp_path / part / "images" / name, np.full((16, 16), patient, np.uint8))
    (tmp_path / "Data_Entry_2017.csv").write_text("".join(lines))
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:24]) + "\n")
    (tmp_path / "test_list.txt").write_text("\n".join(names[24:]) + "\n")
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,\n"]
    boxes += [f"{name},Effusion,4.0,0.0,8.0,4.0,,,\n" for name in (names[34], names[46])]
    boxes += [f"{names[46]},Infiltrate,0.0,8.0,2.0,4.0,,,\n"]
    (tmp_path / "BBox_List_2017.csv").write_text("".join(boxes))
    return tmp_path


def module(folder: Path, split: Literal["official", "boxes", "seeded"] = "official") -> ChestXray14:
    return ChestXray14(str(folder), ("Effusion", "Hernia"), split, loading=SMALL)


def test_labels_patients_and_columns(folder: Path) -> None:
    data = module(folder)
    records = data.records()
    assert len(records) == 48
    assert [r.label for r in records[:12:2]] == [0, 0, 1, 0, 0, 1]
    assert records[10].group == "6"
    assert records[10].columns["finding"] == "Effusion|Hernia"
    assert records[10].columns["sex"] == "F"
    effusion = ChestXray14(str(folder), ("Effusion",), loading=SMALL)
    assert len(effusion.records()) == 32 + 8
    assert effusion.feature_names == ("Effusion",)


def test_the_published_split_and_its_variants(folder: Path) -> None:
    data = module(folder)
    data.setup()
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    assert {r.id for r in test} == set((folder / "test_list.txt").read_text().split())
    assert len(train) + len(val) == 24
    assert 1 <= len({r.group for r in val}) <= 3
    boxed = module(folder, "boxes")
    boxed.setup()
    where = {r.group: name for name, part in boxed.splits.items() for r in part}
    assert sorted([where["18"], where["24"]]) == ["test", "val"]
    seeded = module(folder, "seeded")
    assert {record.split for record in seeded.records()} == {""}


def test_boxes_become_masks(folder: Path) -> None:
    data = module(folder)
    data.prepare_data()
    records = {record.id: record for record in data.records()}
    upper = torch.zeros(8, 8, dtype=torch.bool)
    upper[:2, 2:6] = True
    sample = data.read(records["00000024_000.png"])
    assert sample.mask is not None
    assert sample.mask.equal(upper)
    assert [*sample.features] == ["Effusion"]
    assert sample.image[0, 0, 0] == 24
    assert data.read(records["00000012_000.png"]).mask is None
    other = ChestXray14(str(folder), loading=SMALL, findings=("Infiltration",))
    with pytest.raises(ValueError, match=r"findings name \['Infiltration'\], which no image of"):
        other.records()


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "test_list.txt").write_text("")
    with pytest.raises(ValueError, match=r"00000013_000\.png is in neither list; set split to"):
        module(folder).records()
    (folder / "test_list.txt").unlink()
    with pytest.raises(ValueError, match=r"List .*test_list\.txt is missing"):
        module(folder).records()
    (folder / "images_002" / "images" / "00000024_001.png").unlink()
    with pytest.raises(ValueError, match="1 of 48 images are missing, the first is"):
        module(folder).prepare_data()
    (folder / "Data_Entry_2017.csv").unlink()
    with pytest.raises(ValueError, match=r"Table .*Data_Entry_2017_v2020\.csv .* is missing"):
        module(folder).records()
