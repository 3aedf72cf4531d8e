"""CheXpert and CheXlocalize in the layout of their downloads, written at test time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_image

from datamodules import CheXlocalize
from datamodules.base import Loading
from datamodules.chexlocalize import polygons_to_mask

SMALL = Loading(size=8)
HEAD = "Path,Sex,Age,Frontal/Lateral,AP/PA,Lung Opacity,Pleural Effusion\n"
SQUARE = [[-0.5, -0.5], [7.5, -0.5], [7.5, 7.5], [-0.5, 7.5]]


def view(root: Path, patient: int, name: str = "view1_frontal.jpg") -> str:
    path = Path(f"patient{patient:05d}") / "study1" / name
    write_image(root / path, np.full((16, 16), 51, np.uint8))
    return path.as_posix()


@pytest.fixture
def roots(tmp_path: Path) -> tuple[str, str]:
    """Of CheXlocalize and CheXpert: one image positive in each split, one negative."""
    held, training = tmp_path / "chexlocalize", tmp_path / "CheXpert-v1.0-small"
    rows = ["1.0,", "0.0,1.0", ",-1.0", ","]
    lines = [
        f"CheXpert-v1.0-small/train/{view(training / 'train', k)},Male,50,Frontal,AP,{row}\n"
        for k, row in enumerate(rows, 1)
    ]
    lateral = view(training / "train", 1, "view2_lateral.jpg")
    lines += [f"CheXpert-v1.0-small/train/{lateral},Male,50,Lateral,,1.0,1.0\n"]
    (training / "train.csv").write_text(HEAD + "".join(lines))
    (held / "CheXlocalize").mkdir(parents=True)
    for split, prefix, first in (("val", "CheXpert-v1.0/valid/", 10), ("test", "test/", 20)):
        images = held / "CheXpert" / split
        lines = [
            f"{prefix}{view(images, first)},F,40,Frontal,AP,0,1\n",
            f"{prefix}{view(images, first + 1)},F,40,Frontal,AP,0,0\n",
        ]
        (held / "CheXpert" / f"{split}_labels.csv").write_text(HEAD + "".join(lines))
        outlines = {
            f"patient{first:05d}_study1_view1_frontal": {
                "img_size": [16, 16],
                "Pleural Effusion": [SQUARE, [[1.0, 1.0]]],
                "Airspace Opacity": [[[7.5, 7.5], [15.5, 7.5], [15.5, 15.5], [7.5, 15.5]]],
            }
        }
        name = f"gt_annotations_{split}.json"
        (held / "CheXlocalize" / name).write_text(json.dumps(outlines))
    return str(held), str(training)


def test_labels_of_one_and_of_several_findings(roots: tuple[str, str]) -> None:
    effusion = CheXlocalize(*roots, loading=SMALL)
    effusion.setup()
    labels = {split: [(r.group, r.label) for r in part] for split, part in effusion.splits.items()}
    assert labels["train"] == [("patient00001", 0), ("patient00002", 1), ("patient00004", 0)]
    assert labels["val"] == [("patient00010", 1), ("patient00011", 0)]
    both = CheXlocalize(*roots, ("Lung Opacity", "Pleural Effusion"), SMALL)
    assert [r.label for r in both.records() if r.split == "train"] == [1, 1, 0]


def test_outlines_become_masks(roots: tuple[str, str]) -> None:
    data = CheXlocalize(*roots, ("Lung Opacity", "Pleural Effusion"), SMALL)
    records = {record.group: record for record in data.records()}
    sample = data.read(records["patient00020"])
    effusion, opacity = sample.features["Pleural Effusion"], sample.features["Lung Opacity"]
    upper = torch.zeros(8, 8).bool()
    upper[:4, :4] = True
    assert effusion.equal(upper)
    assert opacity.sum() == 16
    assert sample.mask is not None
    assert sample.mask.equal(upper | opacity)
    assert data.read(records["patient00021"]).mask is None
    assert data.read(records["patient00002"]).image.shape == (1, 8, 8)


def test_polygons_by_hand() -> None:
    assert not polygons_to_mask([[(1.0, 1.0), (3.0, 3.0)]], 4, 4).any()
    square = polygons_to_mask([[(0.5, 0.5), (2.5, 0.5), (2.5, 1.5), (0.5, 1.5)]], 4, 5)
    assert square.nonzero().tolist() == [[1, 1], [1, 2]]


def test_other_sizes_and_missing_files(roots: tuple[str, str]) -> None:
    held, _ = map(Path, roots)
    path = held / "CheXlocalize" / "gt_annotations_test.json"
    outlines = json.loads(path.read_text())
    outlines["patient00020_study1_view1_frontal"]["img_size"] = [20, 16]
    path.write_text(json.dumps(outlines))
    data = CheXlocalize(*roots, loading=SMALL)
    record = next(record for record in data.records() if record.group == "patient00020")
    with pytest.raises(ValueError, match=r"are for \(20, 16\) pixels, but .* has \(16, 16\)"):
        data.read(record)
    path.unlink()
    with pytest.raises(ValueError, match=r"Annotations .*gt_annotations_test\.json are missing"):
        CheXlocalize(*roots, loading=SMALL).read(record)
    (held / "CheXpert" / "test_labels.csv").unlink()
    with pytest.raises(ValueError, match=r"test_labels\.csv .* is missing"):
        CheXlocalize(*roots, loading=SMALL).records()
