"""RSNA pneumonia on small files in the challenge's layout, and on the challenge's own tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from files import write_dicom
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close

from datamodules import decoded as cache
from datamodules.base import Loading, data_root, unpack
from datamodules.decoded import decode_all
from datamodules.images import read_image, resize_image
from datamodules.rsna import RSNAPneumonia, read_tables

SMALL = Loading(size=32, batch_size=4)
EXAMS = {f"{letter * 8}-0000": index for index, letter in enumerate("abcdef")}
SPLIT = {"train": list(EXAMS)[:2], "val": list(EXAMS)[2:4], "test": [list(EXAMS)[4]]}


def pixels(index: int) -> NDArray[np.uint8]:
    """Smooth, so that JPEG keeps it; brighter with the index."""
    return np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8) + np.uint8(20 * index)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six exams: a, c and e with boxes, b and d healthy, f neither and left out."""
    (tmp_path / "stage_2_train_images").mkdir()
    rows, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for exam, index in EXAMS.items():
        write_dicom(
            tmp_path / "stage_2_train_images" / f"{exam}.dcm", pixels(index), index % 2 == 0
        )
        if exam[0] in "ace":
            rows.append(f"{exam},256.0,128.0,512.0,256.0,1")
            classes.append(f"{exam},Lung Opacity")
        else:
            rows.append(f"{exam},,,,,0")
            other = "No Lung Opacity / Not Normal"
            classes.append(f"{exam},{other if exam[0] == 'f' else 'Normal'}")
    first = next(iter(EXAMS))
    rows.append(f"{first},0.0,0.0,32.0,32.0,1")
    classes.append(f"{first},Lung Opacity")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "stage_2_detailed_class_info.csv").write_text("\n".join(classes) + "\n")
    (tmp_path / "authors_split.json").write_text(json.dumps(SPLIT))
    return tmp_path


def test_tables_by_hand(folder: Path) -> None:
    table = read_tables(folder)
    assert table["id"].tolist() == list(EXAMS)[:5]
    assert table["label"].tolist() == [1, 0, 1, 0, 1]
    assert table["split"].tolist() == ["train", "train", "val", "val", "test"]
    assert table["boxes"][0] == [(256, 128, 768, 384), (0, 0, 32, 32)]
    assert table["boxes"][1] == []
    (folder / "stage_2_detailed_class_info.csv").unlink()
    pd.testing.assert_frame_equal(read_tables(folder), table)


def test_challenge_tables_match_the_paper() -> None:
    folder = data_root() / "rsna"
    if not (folder / "authors_split.json").is_file():
        pytest.skip(f"needs {folder}")
    table = read_tables(folder)
    counts = table.groupby("split")["label"].agg(["size", "sum"])
    assert counts.loc[["train", "val", "test"]].to_numpy().tolist() == [
        [11917, 4852],
        [1495, 591],
        [1451, 569],
    ]
    boxes = np.concatenate([row for row in table.loc[table["split"] == "test", "boxes"] if row])
    sides = (boxes[:, 2:] - boxes[:, :2]) * 224 / 1024
    assert len(boxes) == 904
    np.testing.assert_allclose(sides.mean(0), [47.5, 71.8], atol=0.05)  # Table III
    np.testing.assert_allclose(np.median(sides, 0), [46.8, 67.8], atol=0.05)
    np.testing.assert_allclose(sides.prod(1).mean() / 224**2, 0.073, atol=5e-4)


def test_shipped_split_is_the_authors_own(tmp_path: Path) -> None:
    folder = data_root() / "rsna"
    if not (folder / "authors_split.json").is_file():
        pytest.skip(f"needs {folder}")
    (tmp_path / "stage_2_train_labels.csv.gz").symlink_to(
        (folder / "stage_2_train_labels.csv.gz").resolve()
    )
    pd.testing.assert_frame_equal(read_tables(tmp_path), read_tables(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_masks(folder: Path, workers: int) -> None:
    data = RSNAPneumonia(str(folder), loading=Loading(size=32, workers=workers))
    data.prepare_data()
    data.setup()
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [2, 2, 1]
    for index, record in enumerate(data.records()):
        sample = data.read(record)
        expected = pixels(index).reshape(32, 2, 32, 2).mean((1, 3)) / 255
        image = unpack(sample.image)[0]
        assert_close(image, torch.from_numpy(expected).float(), atol=4 / 255, rtol=0)
        assert (sample.mask is None) == (record.label == 0)
    mask = data.read(data.records()[2]).mask
    assert mask is not None
    expected_mask = torch.zeros(32, 32, dtype=torch.bool)
    expected_mask[4:12, 8:24] = True
    assert torch.equal(mask, expected_mask)


def test_cache_is_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RSNAPneumonia(str(folder), loading=SMALL).prepare_data()
    monkeypatch.setattr(cache, "read_image", lambda path, _: pytest.fail(str(path)))
    data = RSNAPneumonia(str(folder), loading=SMALL)
    data.prepare_data()
    assert data.read(data.records()[0]).image.shape == (1, 32, 32)
    (about,) = (folder / "cache").glob("*.json")
    beside = [about.with_suffix(".npy"), about.with_suffix(".facts.npy")]
    assert sorted((folder / "cache").iterdir()) == sorted([about, *beside])
    assert data.decoded(next(iter(EXAMS)))[1] == (64, 64)
    assert json.loads(about.read_text())["ids"] == list(EXAMS)[:5]


def test_sixteen_bits_keep_what_eight_round(folder: Path) -> None:
    fine, coarse = (RSNAPneumonia(str(folder), loading=Loading(32, bits=b)) for b in (16, 8))
    for data in (fine, coarse):
        data.prepare_data()
    record = fine.records()[0]
    exact = resize_image(read_image(fine.paths()[record.id], 1), 32)
    assert fine.read(record).image.dtype == torch.uint16
    assert_close(unpack(fine.read(record).image), exact, atol=0.51 / 65535, rtol=0)
    rounded = (unpack(coarse.read(record).image) - exact).abs().max()
    assert 1 / 65535 < rounded <= 0.51 / 255


def test_a_damaged_image_is_named(folder: Path) -> None:
    data = RSNAPneumonia(str(folder), loading=SMALL)
    data.prepare_data()
    first, second = data.records()[:2]
    pixels = np.load(data.cache_file, "r+")
    pixels[data.places[second.id], 3, 4] ^= 1
    pixels.flush()
    data.read(first)
    with pytest.raises(ValueError, match=f"damaged: image '{second.id}' has another checksum"):
        data.read(second)


def test_other_settings_are_another_cache(folder: Path) -> None:
    small, large = (RSNAPneumonia(str(folder), loading=Loading(size=s)) for s in (16, 32))
    assert small.cache_file != large.cache_file
    (folder / "authors_split.json").write_text(json.dumps({"train": SPLIT["train"]}))
    (folder / "stage_2_detailed_class_info.csv").unlink()
    assert RSNAPneumonia(str(folder), loading=Loading(size=16)).cache_file != small.cache_file


@settings(max_examples=8, deadline=None)
@given(stops=st.sets(st.integers(0, 5)))
def test_interrupted_decoding_is_taken_up(
    stops: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("images")
    paths = {str(index): folder / f"{index}.dcm" for index in range(6)}
    for index, path in enumerate(paths.values()):
        write_dicom(path, pixels(index), compressed=False)
    decoded: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        for stop in [folder / f"{index}.dcm" for index in sorted(stops)]:

            def read(path: Path, channels: Literal[1, 3], stop: Path = stop) -> Tensor:
                if path == stop:
                    raise KeyboardInterrupt
                decoded.append(path)
                return read_image(path, channels)

            patch.setattr(cache, "read_image", read)
            with pytest.raises(KeyboardInterrupt):
                decode_all(paths, 32, 0, folder / "all.npy")
            assert not (folder / "all.npy").exists()
    assert decoded == [folder / f"{index}.dcm" for index in range(max(stops, default=0))]
    decode_all(paths, 32, 0, folder / "all.npy")
    decode_all(paths, 32, 0, folder / "at_once.npy")
    np.testing.assert_array_equal(np.load(folder / "all.npy"), np.load(folder / "at_once.npy"))


def test_three_channels_and_seeded_split(folder: Path) -> None:
    data = RSNAPneumonia(str(folder), "seeded", "elsewhere", Loading(size=32, channels=3))
    assert data.cache == data_root() / "elsewhere"
    assert {record.split for record in data.records()} == {""}
    data = RSNAPneumonia(str(folder), "seeded", str(folder / "c"), Loading(size=32, channels=3))
    data.prepare_data()
    image = data.read(data.records()[1]).image
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[2])


def test_broken_downloads_are_named(folder: Path, tmp_path: Path) -> None:
    data = RSNAPneumonia(str(folder), loading=SMALL)
    with pytest.raises(ValueError, match=r"Cache .* is missing; call prepare_data first"):
        data.read(data.records()[0])
    gone = list(EXAMS)[3]
    os.remove(folder / "stage_2_train_images" / f"{gone}.dcm")
    with pytest.raises(ValueError, match=rf"1 of 5 images are missing, the first is .*{gone}\.dcm"):
        data.prepare_data()
    (folder / "authors_split.json").unlink()
    with pytest.raises(ValueError, match=r"Exam a{8}-0000 is not in the authors' split"):
        RSNAPneumonia(str(folder)).records()
    (folder / "stage_2_train_labels.csv").write_text("patientId,Target\na,0\n")
    with pytest.raises(ValueError, match="column 'x' is missing; it has patientId, Target"):
        read_tables(folder)
    with pytest.raises(ValueError, match=r"stage_2_train_labels\.csv \(or \.gz\) is missing"):
        read_tables(tmp_path / "nowhere")
