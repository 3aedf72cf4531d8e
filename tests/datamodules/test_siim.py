"""SIIM-ACR pneumothorax in the layout of its download, written at test time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_dicom
from hypothesis import given
from hypothesis.extra.numpy import arrays

from datamodules import SIIMPneumothorax
from datamodules.base import Loading
from datamodules.siim import relative_runs_to_mask

COLUMN = "262144 262144"  # the second quarter of the columns of 1024 x 1024 pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images, two of them with pneumothorax, one in two lines."""
    lines = ["ImageId, EncodedPixels"]  # with the challenge's blank
    for k in range(20):
        texts = {0: [f" {COLUMN}"], 1: ["0 1024", "1048575 1"]}.get(k, [" -1"])
        lines += [f"1.2.{k},{text}" for text in texts]
        path = tmp_path / "dicom-images-train" / f"s{k}" / f"e{k}" / f"1.2.{k}.dcm"
        write_dicom(path, np.full((8, 8), k, np.uint8))
    (tmp_path / "train-rle.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_images_and_masks(folder: Path) -> None:
    data = SIIMPneumothorax(str(folder), loading=Loading(size=4))
    data.prepare_data()
    records = data.records()
    assert [record.label for record in records[:3]] == [1, 1, 0]
    first, second, healthy = (data.read(record) for record in records[:3])
    assert first.mask is not None
    assert first.mask.equal(torch.tensor([[False, True, False, False]] * 4))
    assert healthy.mask is None
    assert healthy.image[0, 0, 0] == 2
    full = SIIMPneumothorax(str(folder), loading=Loading(size=1024))
    full.prepare_data()
    both = full.read(records[1]).mask
    assert both is not None
    assert both.sum() == 1025
    assert both[:, 0].all()
    assert both[-1, -1]
    assert second.mask is not None


@given(arrays(bool, (5, 7)))
def test_runs_by_columns(mask: np.ndarray) -> None:
    """Encoded by hand, pixel by pixel."""
    pairs: list[list[int]] = []
    gap = 0
    inside = False
    for pixel in mask.T.flatten():
        if pixel and not inside:
            pairs.append([gap, 0])
        if pixel:
            pairs[-1][1] += 1
        gap = 0 if pixel else gap + 1
        inside = bool(pixel)
    text = " ".join(f"{skip} {length}" for skip, length in pairs)
    if pairs:
        assert relative_runs_to_mask(text, 5, 7).numpy().tolist() == mask.tolist()


@pytest.mark.parametrize("text", ["3", "a b", "1.5 2", ""])
def test_text_that_is_no_mask(text: str) -> None:
    with pytest.raises(ValueError, match="a mask must be pairs of numbers, but got"):
        relative_runs_to_mask(text, 4, 4)


@pytest.mark.parametrize("text", ["10 7", "-1 3", "3 -1"])
def test_masks_outside_the_image(text: str) -> None:
    with pytest.raises(ValueError, match="a mask must lie in 4 x 4 pixels, but got"):
        relative_runs_to_mask(text, 4, 4)


def test_a_broken_mask_names_its_image(folder: Path) -> None:
    (folder / "train-rle.csv").write_text("ImageId, EncodedPixels\n1.2.0,1048576 1\n")
    data = SIIMPneumothorax(str(folder), loading=Loading(size=4))
    data.prepare_data()
    with pytest.raises(ValueError, match=r"Image '1\.2\.0': a mask must lie in 1024 x 1024"):
        data.read(data.records()[0])
