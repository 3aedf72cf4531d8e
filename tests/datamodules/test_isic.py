"""ISIC 2018 in the layout of its downloads, written at test time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_image, write_isic

from datamodules import ISIC2018
from datamodules.base import Loading

SMALL = Loading(size=8, channels=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks 1 and 2: a nevus, a melanoma and a keratosis in each part; task 3: 24 images."""
    write_isic(tmp_path)
    lines, lesions = ["image,MEL,NV,BCC"], ["image,lesion_id,diagnosis_confirm_type"]
    for k in range(24):
        name = f"ISIC_{24306 + k:07d}"
        lines.append(f"{name}," + ("1.0,0.0,0.0", "0.0,1.0,0.0", "0.0,0.0,1.0")[k % 3])
        lesions.append(f"{name},HAM_{k // 6 * 3 + k % 3:07d},histopathology")
        path = tmp_path / "ISIC2018_Task3_Training_Input" / f"{name}.jpg"
        write_image(path, np.full((8, 8, 3), k, np.uint8))
    truth = tmp_path / "ISIC2018_Task3_Training_GroundTruth"
    truth.mkdir()
    name = "ISIC2018_Task3_Training_GroundTruth.csv"
    (truth / name).write_text("\n".join(lines) + "\n")
    name = "ISIC2018_Task3_Training_LesionGroupings.csv"
    (tmp_path / name).write_text("\n".join(lesions) + "\n")
    return tmp_path


def test_features_outlines_and_diagnoses(folder: Path) -> None:
    data = ISIC2018(str(folder), loading=SMALL)
    assert data.class_names == ("nevus", "melanoma")
    data.setup()
    assert {name: [r.id for r in part] for name, part in data.splits.items()} == {
        "train": ["ISIC_0000000", "ISIC_0000001"],
        "val": ["ISIC_0000010", "ISIC_0000011"],
        "test": ["ISIC_0000020", "ISIC_0000021"],
    }
    assert [record.label for record in data.records()] == [0, 1] * 3
    for record in data.records():
        sample = data.read(record)
        assert [*sample.features] == ["globules", "streaks"]
        assert sample.features["globules"].sum() == 32
        assert sample.mask is not None
        assert sample.mask.sum() == 32 + 8
        assert sample.image.shape == (3, 8, 8)
    batch = next(iter(data.loader("test")))
    assert batch["features"].shape == (2, 5, 8, 8)
    lesion = ISIC2018(str(folder), evidence="lesion", loading=SMALL)
    mask = lesion.read(data.records()[0]).mask
    assert mask is not None
    middle = torch.zeros(8, 8).bool()
    middle[2:6, 2:6] = True
    assert mask.equal(middle)


def test_classes_merge_diagnoses(folder: Path) -> None:
    classes = {"benign": ["nevus", "seborrheic_keratosis"], "melanoma": ["melanoma"]}
    data = ISIC2018(str(folder), classes=classes, loading=SMALL)
    assert [record.label for record in data.records()[:3]] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"classes name \['MEL'\]; .* has \['melanoma', 'sebor"):
        ISIC2018(str(folder), classes={"nevus": ["nevus"], "m": ["MEL"]}).records()


def test_diagnoses_of_task_3_keep_lesions_together(folder: Path) -> None:
    data = ISIC2018(str(folder), "diagnosis", loading=SMALL)
    records = data.records()
    assert len(records) == 16
    assert {record.split for record in records} == {""}
    assert [r.label for r in records[:4]] == [1, 0, 1, 0]
    assert len({record.group for record in records}) == 8
    assert data.read(records[0]).mask is None
    folds = ISIC2018(str(folder), "diagnosis", loading=SMALL, fold=0, folds=3)
    folds.setup()
    homes = [{r.group for r in part} for part in folds.splits.values()]
    assert sum(map(len, homes)) == len(set().union(*homes))


def test_nothing_there_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere has no images of ISIC 2018; unpack them there"):
        ISIC2018(str(tmp_path / "nowhere")).records()
    (folder / "ISIC-2017_Training_Part3_GroundTruth.csv").unlink()
    with pytest.raises(ValueError, match=r"Part3_GroundTruth\.csv .* is missing"):
        ISIC2018(str(folder)).records()
