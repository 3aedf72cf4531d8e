"""VinDr-CXR in the layout of its download, written at test time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_dicom

from datamodules import VinDrCXR
from datamodules.base import Loading

SMALL = Loading(size=8)
BOX = "4.0,0.0,12.0,4.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """22 training images by three readers: a two findings, b one, the others none; 2 for test."""
    train = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
    train += [f"a,R{k},Nodule/Mass,{BOX}" for k in (1, 2)] + ["a,R3,Cardiomegaly,0,8,16,16"]
    train += [f"b,R1,Cardiomegaly,{BOX}", "b,R2,No finding,,,,", "b,R3,No finding,,,,"]
    healthy = [f"h{k}" for k in range(20)]
    train += [f"{name},R{k},No finding,,,," for name in healthy for k in (1, 2, 3)]
    test = ["image_id,class_name,x_min,y_min,x_max,y_max", f"s,Cardiomegaly,{BOX}"]
    test += ["t,No finding,,,,"]
    (tmp_path / "annotations").mkdir()
    for part, lines in (("train", train), ("test", test)):
        table = tmp_path / "annotations" / f"annotations_{part}.csv"
        table.write_text("\n".join(lines) + "\n")
    for name in ("a", "b", *healthy):
        write_dicom(tmp_path / "train" / f"{name}.dicom", np.full((16, 16), 51, np.uint8))
    for name in ("s", "t"):
        write_dicom(tmp_path / "test" / f"{name}.dicom", np.full((16, 16), 51, np.uint8))
    return tmp_path


def test_images_are_kept_by_their_readers(folder: Path) -> None:
    data = VinDrCXR(str(folder), loading=SMALL)
    assert data.feature_names == ("Cardiomegaly", "Nodule/Mass")
    labels = {record.id: record.label for record in data.records()}
    assert (labels["a"], labels["s"], labels["t"], labels["h3"]) == (1, 1, 0, 0)
    assert "b" not in labels
    assert "b" in {r.id for r in VinDrCXR(str(folder), readers=1, loading=SMALL).records()}
    nodules = VinDrCXR(str(folder), ("Nodule/Mass",), loading=SMALL)
    assert {r.id for r in nodules.records() if r.label} == {"a"}
    data.setup()
    assert {r.id for r in data.splits["test"]} == {"s", "t"}
    assert 1 <= len(data.splits["val"]) <= 3


def test_boxes_become_masks(folder: Path) -> None:
    data = VinDrCXR(str(folder), loading=SMALL)
    data.prepare_data()
    records = {record.id: record for record in data.records()}
    sample = data.read(records["a"])
    nodule, heart = torch.zeros(8, 8).bool(), torch.zeros(8, 8).bool()
    nodule[:2, 2:6], heart[4:] = True, True
    assert sample.features["Nodule/Mass"].equal(nodule)
    assert sample.mask is not None
    assert sample.mask.equal(nodule | heart)
    assert data.read(records["t"]).mask is None
    nodules = VinDrCXR(str(folder), ("Nodule/Mass",), loading=SMALL)
    nodules.prepare_data()
    assert [*nodules.read(records["a"]).features] == ["Nodule/Mass"]


def test_unknown_findings_and_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"findings name \['Mass'\]; the tables have \['Cardio"):
        VinDrCXR(str(folder), ("Mass",))
    with pytest.raises(ValueError, match="readers must be 1 to 3, as many as read an image, got 4"):
        VinDrCXR(str(folder), readers=4)
    with pytest.raises(ValueError, match=r"annotations_train\.csv .* is missing"):
        VinDrCXR(str(tmp_path / "nowhere"))
