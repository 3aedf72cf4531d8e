"""One's own files: every kind that is read, what is not, and what is left after a stop."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from files import write_dicom, write_image
from PIL import Image
from pydicom import dcmread
from torch import Tensor

from datamodules.base import data_root
from datamodules.images import read_image, resize_image
from explainers import load_explainer
from explainers.__main__ import explain, main
from explainers.inference import Answer
from explainers.inference.explain import Model, explain_files, found_files, overlay, region_boxes


def bright(image: Tensor) -> Answer:
    """The image itself is the map; bright ones are ill."""
    share = image.mean((1, 2, 3))
    probability = torch.stack([1 - share, share], 1)
    return Answer(probability, probability.argmax(1), image, image, image.mean(1))


MODEL = Model(bright, 16, 1, ["well", "ill"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PNG with a bright spot, a DICOM file, two frames of a TIFF, and a text that is no image."""
    spot = np.zeros((32, 64), np.uint8)
    spot[8:16, 32:48] = 255
    write_image(tmp_path / "in" / "spot.png", spot)
    write_dicom(tmp_path / "in" / "below" / "film.dcm", np.full((16, 16), 200, np.uint8))
    write_dicom(tmp_path / "in" / "below" / "I0001", np.full((16, 16), 100, np.uint8))
    (tmp_path / "in" / "README").write_text("not a picture")
    frames = [Image.new("L", (16, 16), value) for value in (0, 255)]
    path = tmp_path / "in" / "pages.tiff"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    (tmp_path / "in" / "broken.png").write_text("no image")
    return tmp_path


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_of_file_and_what_cannot_be_read(folder: Path) -> None:
    failed = explain_files(MODEL, [str(folder / "in")], folder / "out", batch_size=2)
    assert [Path(row["image"]).name for row in failed] == ["broken.png"]
    assert "cannot be read" in failed[0]["error"]
    rows = {(Path(row["image"]).name, row["frame"]): row for row in table(folder)}
    assert {*rows} == {
        ("spot.png", ""),
        ("film.dcm", ""),
        ("I0001", ""),
        ("pages.tiff", "0"),
        ("pages.tiff", "1"),
        ("broken.png", ""),
    }
    assert rows["film.dcm", ""]["decision"] == "ill"
    assert float(rows["film.dcm", ""]["p(ill)"]) == pytest.approx(200 / 255, abs=1e-3)
    assert [rows["pages.tiff", k]["decision"] for k in "01"] == ["well", "ill"]
    spot = rows["spot.png", ""]
    heat = np.load(folder / "out" / f"{spot['name']}.npy")
    assert heat.shape == (32, 64)
    peak = int(spot["peak_x"]), int(spot["peak_y"])
    assert 32 <= peak[0] < 48
    assert 8 <= peak[1] < 16
    x0, y0, x1, y1 = json.loads(spot["boxes"])[0]
    assert 30 <= x0 <= 34 and 6 <= y0 <= 10 and 46 <= x1 <= 50 and 14 <= y1 <= 18  # noqa: PT018
    picture = np.asarray(Image.open(folder / "out" / f"{spot['name']}.png"))
    assert picture.shape == (32, 64, 3)
    assert picture[10, 40].sum() > picture[0, 0].sum()


def test_dicom_objects_are_written_or_missed_aloud(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, out = folder / "in", folder / "out"
    write_dicom(inside / "spot.dcm", np.asarray(Image.open(inside / "spot.png")))
    lost = dcmread(inside / "below" / "film.dcm")
    del lost.StudyInstanceUID
    lost.save_as(inside / "lost.dcm")
    failed = explain_files(MODEL, [str(inside)], out)
    reason = "belongs to no study, for want of StudyInstanceUID."
    assert [row["error"] for row in failed if row["error"].endswith(reason)] == [
        f"DICOM objects of {inside / 'lost.dcm'} cannot be written: it {reason}"
    ]
    rows = {Path(row["image"]).name: row for row in table(folder)}
    assert rows["lost.dcm"]["decision"] == "ill"
    heat = np.load(out / f"{rows['spot.dcm']['name']}.npy")
    region = dcmread(out / f"{rows['spot.dcm']['name']}_region.dcm")
    assert region.pixel_array.any()
    assert ((region.pixel_array > 0) == (heat > np.percentile(heat, 95))).all()
    assert len([*out.glob("*_overlay.dcm")]) == 3
    monkeypatch.setattr("explainers.inference.explain.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="DICOM files need the extra dicom"):
        explain_files(MODEL, [str(inside)], out)


def test_batches_side_by_side_give_the_same_table(folder: Path) -> None:
    explain_files(MODEL, [str(folder / "in")], folder / "out", batch_size=1)
    one = table(folder)
    explain_files(MODEL, [str(folder / "in")], folder / "two", batch_size=1, workers=2)
    with (folder / "two" / "results.csv").open(newline="") as file:
        assert [*csv.DictReader(file)] == one
    with pytest.raises(ValueError, match="workers must be 1 or more, but got 0"):
        explain_files(MODEL, [str(folder / "in")], folder / "three", workers=0)


def test_an_interrupted_call_goes_on(folder: Path) -> None:
    calls: list[int] = []

    def stops(image: Tensor) -> Answer:
        calls.append(len(image))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bright(image)

    stopping = MODEL._replace(answer=stops)
    with pytest.raises(KeyboardInterrupt):
        explain_files(stopping, [str(folder / "in")], folder / "out", batch_size=2)
    results = folder / "out" / "results.csv"
    kept, before = len(table(folder)), len(calls)
    with results.open("a") as file:
        file.write("torn,li")  # a line that was being written
    explain_files(stopping, [str(folder / "in")], folder / "out", batch_size=2)
    rows = [(row["image"], row["frame"]) for row in table(folder)]
    assert len(rows) == len(set(rows)) == 6
    assert sum(calls[before:]) == 5 - sum(1 for row in table(folder)[:kept] if not row["error"])
    again = len(calls)
    assert len(explain_files(stopping, [str(folder / "in")], folder / "out")) == 1  # tried again
    assert len(calls) == again
    other = MODEL._replace(class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"results\.csv is of another model or other settings"):
        explain_files(other, [str(folder / "in")], folder / "out")
    with pytest.raises(ValueError, match=r"results\.csv is of another model or other settings"):
        explain_files(stopping, [str(folder / "in")], folder / "out", percentile=90)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, but got 0"):
        explain_files(stopping, [str(folder / "in")], folder / "out", batch_size=0)
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 100\], but got 101"):
        explain_files(stopping, [str(folder / "in")], folder / "out", percentile=101)


def test_what_is_not_asked_for_stays_and_a_slip_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match="names no image"):
        explain_files(MODEL, [str(folder / "nope*")], folder / "out", percentile=50)
    assert not (folder / "out").exists()
    explain_files(MODEL, [str(folder / "in" / "broken.png")], folder / "out")
    explain_files(MODEL, [str(folder / "in" / "spot.png")], folder / "out")
    assert [Path(row["image"]).name for row in table(folder)] == ["broken.png", "spot.png"]


def test_a_map_that_is_not_finite_is_an_error(folder: Path) -> None:
    def lost(image: Tensor) -> Answer:
        return bright(image)._replace(map=image.mean(1) * torch.nan)

    model = MODEL._replace(answer=lost)
    [row] = explain_files(model, [str(folder / "in" / "spot.png")], folder / "out")
    assert row["error"].endswith("spot.png is not finite: the model fails on this image.")


def test_files_by_name_pattern_and_table(folder: Path) -> None:
    inside = folder / "in"
    (inside / "list.csv").write_text("image,age\nspot.png,40\nbelow/film.dcm,50\n")
    spot, film = inside / "spot.png", inside / "below" / "film.dcm"
    assert found_files([str(inside / "*.png")]) == [inside / "broken.png", spot]
    assert found_files([str(inside / "list.csv"), str(spot)]) == [spot, film]
    with pytest.raises(ValueError, match=r"'nothing\*' names no image: give files, folders"):
        found_files(["nothing*"])
    (inside / "other.csv").write_text("file\nspot.png\n")
    with pytest.raises(ValueError, match="column 'image' is missing; it has file"):
        found_files([str(inside / "other.csv")])


def test_a_constant_map_has_no_region() -> None:
    flat = np.zeros((8, 8), np.float32)
    assert region_boxes(flat > np.percentile(flat, 95)) == []
    assert not overlay(torch.zeros(1, 8, 8), flat).any()


def test_a_checkpoint_by_the_command(
    phantom_single: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    arguments = ["explain", str(phantom_single), str(folder / "in"), "-o", str(out)]
    with pytest.raises(SystemExit, match=r"1 picture\(s\) could not be read"):
        main([*arguments, "--accelerator", "cpu", "--smoothing", "0.05"])
    assert "broken.png cannot be read" in capsys.readouterr().out.replace("\n", "")
    explainer = load_explainer(phantom_single)
    row = next(row for row in table(folder) if row["image"].endswith("film.dcm"))
    image = resize_image(read_image(row["image"], 1), 32)[None]
    expected = explainer.explain(image, smoothing=0.05)
    found = torch.from_numpy(np.load(out / f"{row['name']}.npy"))[None, None]
    shown = torch.nn.functional.interpolate(expected[None], (16, 16), mode="bilinear")
    torch.testing.assert_close(found, shown)
    (phantom_single.parent / "elsewhere").mkdir(exist_ok=True)
    copied = phantom_single.parent / "elsewhere" / "best.ckpt"
    copied.write_bytes(phantom_single.read_bytes())
    with pytest.raises(ValueError, match="tells no size: give that which"):
        explain(str(copied), [str(folder / "in")], str(out))


def test_the_real_dicom_files(phantom_single: Path, tmp_path: Path) -> None:
    if not (data_root() / "dicom").is_dir():
        pytest.skip(f"needs {data_root() / 'dicom'}")
    failed = explain(
        str(phantom_single), [str(data_root() / "dicom")], str(tmp_path / "out"), accelerator="cpu"
    )
    assert failed == []
    for row in table(tmp_path):
        heat = np.load(tmp_path / "out" / f"{row['name']}.npy")
        frame = int(row["frame"]) if row["frame"] else None
        assert heat.shape == read_image(row["image"], 1, frame).shape[1:]
        assert np.isfinite(heat).all()
