"""BUSI in the layout of the public download, written at test time."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datamodules.base import Loading, data_root
from datamodules.busi import BUSI

COUNTS = {"normal": 133, "benign": 437, "malignant": 210}
SMALL = Loading(size=8)


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The download's tree: RGB images of 16 x 8 pixels; a lesion is the upper left quarter."""
    root = tmp_path_factory.mktemp("data") / "Dataset_BUSI_with_GT"
    empty = np.zeros((16, 8), np.uint8)
    corner, other = empty.copy(), empty.copy()
    corner[:8, :4] = 255
    other[8:, 4:] = 255
    for label, count in COUNTS.items():
        (root / label).mkdir(parents=True)
        for number in range(1, count + 1):
            name = root / label / f"{label} ({number})"
            Path(f"{name}.png").write_bytes(png(np.full((16, 8, 3), 51, np.uint8)))
            mask = empty if label == "normal" else corner
            Path(f"{name}_mask.png").write_bytes(png(mask))
    (root / "benign" / "benign (4)_mask_1.png").write_bytes(png(other))
    return root


def test_counts_and_classes(folder: Path) -> None:
    three = BUSI(str(folder), "three", SMALL)
    assert three.class_names == ("normal", "benign", "malignant")
    assert np.bincount([record.label for record in three.records()]).tolist() == [133, 437, 210]
    lesion = BUSI(str(folder), "lesion", SMALL)
    lesion.setup()
    assert np.bincount([record.label for record in lesion.records()]).tolist() == [133, 647]
    assert [len(lesion.splits[s]) for s in ("train", "val", "test")] == [545, 85, 150]


def test_masks_of_one_image_are_merged(folder: Path) -> None:
    data = BUSI(str(folder), loading=SMALL)
    by_id = {record.id: record for record in data.records()}
    one, two = data.read(by_id["benign (40)"]), data.read(by_id["benign (4)"])
    assert_close(one.image, torch.full((1, 8, 8), 0.2))
    assert one.mask is not None
    assert two.mask is not None
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, :4] = True
    assert torch.equal(one.mask, corner)
    assert torch.equal(two.mask, corner | corner.flip(0, 1))
    assert data.read(by_id["normal (1)"]).mask is None


def test_split_and_group_are_those_of_the_prepared_table(folder: Path) -> None:
    table = data_root() / "busi" / "labels.csv"
    if not table.is_file():
        pytest.skip(f"needs {table}")
    frame = pd.read_csv(table)
    records = BUSI(str(folder), loading=SMALL).records()
    names = [
        f"images/{record.columns['label']}_{int(record.id.split('(')[1][:-1]):03}.png"
        for record in records
    ]
    assert names == frame["image"].tolist()
    assert [record.split for record in records] == frame["split"].tolist()
    groups = [float(record.group or "nan") for record in records]
    np.testing.assert_array_equal(groups, frame["dup_group"])


def test_broken_downloads_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"normal \(1\)\.png is missing; unpack the download"):
        BUSI(str(tmp_path)).records()
    data = BUSI(str(folder), loading=SMALL)
    by_id = {record.id: record for record in data.records()}
    mask = folder / "malignant" / "malignant (9)_mask.png"
    mask.write_bytes(png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(ValueError, match=r"size \(16, 8\), but has \(8, 8\)"):
        data.read(by_id["malignant (9)"])
    mask.unlink()
    with pytest.raises(ValueError, match=r"needs a mask malignant \(9\)_mask\.png"):
        data.read(by_id["malignant (9)"])
