"""COCO files: their three kinds of annotation, and what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import write_image
from pycocotools import mask as coco

from datamodules import ImageTable
from datamodules.base import Loading
from datamodules.coco import annotation_mask

SMALL = Loading(size=8)


def upper() -> np.ndarray:
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 1
    return mask


def content() -> dict[str, Any]:
    """a: a dent's polygon and a crack's box; b: a crack's compressed runs; c: nothing."""
    whole = coco.encode(np.asfortranarray(upper()))
    images = [
        {"id": k, "file_name": f"{name}.png", "width": 16, "height": 16, "split": split}
        for k, (name, split) in enumerate([("a", "train"), ("b", "val"), ("c", "test")], 7)
    ]
    annotations = [
        {"image_id": 7, "category_id": 2, "segmentation": [[0, 0, 8, 0, 8, 16, 0, 16]]},
        {"image_id": 7, "category_id": 1, "bbox": [8, 8, 8, 8], "area": 64},
        {"image_id": 8, "category_id": 1, "segmentation": {**whole, "counts": "?"}},
    ]
    annotations[2]["segmentation"]["counts"] = whole["counts"].decode()
    categories = [{"id": 1, "name": "crack"}, {"id": 2, "name": "dent"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, coco_file: object) -> ImageTable:
    for name in "abc":
        write_image(folder / "images" / f"{name}.png", np.full((16, 16), 51, np.uint8))
    (folder / "table.json").write_text(json.dumps(coco_file))
    classes = {"sound": ["none"], "defect": ["crack", "crack + dent"]}
    features = ["crack", "dent"]
    return ImageTable(
        str(folder / "table.json"), classes, None, features, folder="images", loading=SMALL
    )


def test_images_labels_and_masks(tmp_path: Path) -> None:
    data = write(tmp_path, content())
    data.setup()
    first, second, third = data.records()
    assert [record.label for record in (first, second, third)] == [1, 1, 0]
    assert [record.split for record in (first, second, third)] == ["train", "val", "test"]
    assert first.id == "7"
    assert first.columns["label"] == "crack + dent"
    sample = data.read(first)
    left, corner = torch.zeros(8, 8).bool(), torch.zeros(8, 8).bool()
    left[:, :4], corner[4:, 4:] = True, True
    assert sample.features["dent"].equal(left)
    assert sample.features["crack"].equal(corner)
    assert sample.mask is not None
    assert sample.mask.equal(left | corner)
    runs = data.read(second).mask
    assert runs is not None
    assert runs.equal(left.T)
    assert data.read(third).mask is None
    batch = next(iter(data.loader("train")))
    assert batch["features"][0].equal(torch.stack([corner, left]))


def test_runs_that_are_not_compressed_and_two_polygons() -> None:
    runs = {"size": [2, 4], "counts": [2, 2, 4]}  # by columns: the second of four
    assert (
        annotation_mask({"segmentation": runs}, 2, 4, 4).tolist()
        == [[False, True, False, False]] * 4
    )
    two = [[0, 0, 2, 0, 2, 2, 0, 2], [2, 2, 4, 2, 4, 4, 2, 4]]
    assert annotation_mask({"segmentation": two}, 4, 4, 4).sum() == 8


def test_what_is_no_coco_file(tmp_path: Path) -> None:
    broken = content()
    broken["annotations"][1]["category_id"] = 9
    with pytest.raises(ValueError, match=r"annotation 1 names image 7 and category 9, and one"):
        write(tmp_path, broken).records()
    with pytest.raises(ValueError, match=r"table\.json: COCO's entry 'categories' is missing"):
        write(tmp_path, {"images": []}).records()
    with pytest.raises(ValueError, match="is not in COCO's format"):
        write(tmp_path, [1, 2]).records()
    other = content()
    other["annotations"][2]["segmentation"]["size"] = [8, 32]
    data = write(tmp_path, other)
    with pytest.raises(ValueError, match=r"image 1: its segmentation is for 8 x 32 pixels, but"):
        data.read(data.records()[1])
    empty = content()
    del empty["annotations"][1]["bbox"]
    data = write(tmp_path, empty)
    with pytest.raises(ValueError, match=r"image 0: an annotation needs a segmentation or a bbox"):
        data.read(data.records()[0])
    unknown = content()
    unknown["categories"][1]["name"] = "stain"
    with pytest.raises(ValueError, match=r"image 0: label 'crack \+ stain' is unknown"):
        write(tmp_path, unknown).records()
