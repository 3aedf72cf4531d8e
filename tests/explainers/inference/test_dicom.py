"""DICOM objects of a map: what they refer to, what they show, and what a checker says of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import write_dicom
from highdicom.seg import segread
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, UltrasoundMultiFrameImageStorage

from datamodules.base import data_root
from explainers.inference.dicom import write_objects

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
CHECKER = shutil.which("dciodvfy")  # of Debian's dicom3tools
REAL = sorted((data_root() / "dicom").glob("*.dcm"))


def written(source: Path, frame: int | None = None, settings: str = "") -> tuple[Dataset, Dataset]:
    """Overlay and region: the left upper corner is relevant and red."""
    header = dcmread(source, stop_before_pixels=True)
    region = np.zeros((header.Rows, header.Columns), bool)
    region[:4, :2] = True
    overlay = np.zeros((*region.shape, 3), np.uint8)
    overlay[region] = (255, 0, 0)
    stem = source.parent / f"map{frame}"
    write_objects(source, frame, overlay, region, "above percentile 95", settings, stem)
    pair = [stem.with_name(f"{stem.name}_{kind}.dcm") for kind in ("overlay", "region")]
    assert segread(pair[1]).number_of_segments == 1
    return dcmread(pair[0]), dcmread(pair[1])


def sourced(mask: Dataset) -> Dataset:
    """What the only frame of a segmentation was made of."""
    [frame] = mask.PerFrameFunctionalGroupsSequence
    return frame.DerivationImageSequence[0].SourceImageSequence[0]


def changed(path: Path, **values: Any) -> Path:
    """The file with other values in its header."""
    dataset = dcmread(path)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.dcm"
    write_dicom(path, np.full((16, 24), 200, np.uint8))
    return changed(path, PatientID="P7", PatientName="Doe^Jane", InstanceNumber=5)


def test_patient_study_and_source(film: Path) -> None:
    overlay, region = written(film)
    for found in (overlay, region):
        assert (found.PatientID, found.PatientName) == ("P7", "Doe^Jane")
        assert found.StudyInstanceUID == "1.2.1"
        assert found.SeriesInstanceUID != "1.2.2"
        assert (found.Rows, found.Columns, found.InstanceNumber) == (16, 24, 5)
        assert "not for diagnosis" in found.SeriesDescription
    [reference] = overlay.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == sourced(region).ReferencedSOPInstanceUID == "1.2.3"
    assert (overlay.pixel_array[:4, :2] == (255, 0, 0)).all()
    assert overlay.pixel_array.sum() == 4 * 2 * 255
    assert region.pixel_array[:4, :2].all()
    assert region.pixel_array.sum() == 4 * 2
    assert region.SegmentSequence[0].SegmentLabel == "above percentile 95"


def test_one_series_for_a_series_and_its_settings(film: Path) -> None:
    first, again, other = written(film), written(film), written(film, settings="views")
    for k in range(2):
        assert first[k].SeriesInstanceUID == again[k].SeriesInstanceUID
        assert first[k].SeriesInstanceUID != other[k].SeriesInstanceUID
        assert first[k].SOPInstanceUID != again[k].SOPInstanceUID
    assert first[0].SeriesInstanceUID != first[1].SeriesInstanceUID


def frames_of(film: Path, kind: str) -> Path:
    """Three frames of 8 x 24 pixels."""
    pixels = bytes(3 * 8 * 24)
    return changed(film, SOPClassUID=kind, NumberOfFrames=3, Rows=8, PixelData=pixels)


def test_a_frame_of_an_ultrasound_film(film: Path) -> None:
    overlay, region = written(frames_of(film, UltrasoundMultiFrameImageStorage), 2)
    [listed] = region.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert listed.ReferencedSOPClassUID == UltrasoundMultiFrameImageStorage
    for reference in (overlay.SourceImageSequence[0], sourced(region)):
        assert reference.ReferencedSOPClassUID == UltrasoundMultiFrameImageStorage
        assert reference.ReferencedFrameNumber == 3
    assert overlay.InstanceNumber == region.InstanceNumber == 3
    assert region.pixel_array[:4, :2].all()


def test_a_frame_of_an_enhanced_series_keeps_its_place(film: Path) -> None:
    shared, frames = Dataset(), [Dataset() for _ in range(3)]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [Dataset()], [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.5]
    shared.PixelMeasuresSequence[0].SliceThickness = 2
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for k, frame in enumerate(frames):
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = [10, 20, 2 * k]
    path = changed(
        frames_of(film, ENHANCED_MR),
        FrameOfReferenceUID="1.2.9",
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    overlay, region = written(path, 1)
    assert overlay.SourceImageSequence[0].ReferencedFrameNumber == 2
    assert sourced(region).ReferencedFrameNumber == 2
    [placed] = region.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    assert placed.ImagePositionPatient == [10, 20, 2]
    assert region.FrameOfReferenceUID == "1.2.9"


SPACE = {
    "FrameOfReferenceUID": "1.2.9",
    "ImagePositionPatient": [0, 0, 0],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [0.5, 0.5],
    "SliceThickness": 2,
}
HEADERS: dict[str, dict[str, Any]] = {
    "whole": {"SOPClassUID": CTImageStorage, **SPACE},
    "thickness empty": {"SOPClassUID": CTImageStorage, **SPACE, "SliceThickness": None},
    "position empty": {"SOPClassUID": CTImageStorage, **SPACE, "ImagePositionPatient": None},
    "position alone": {"ImagePositionPatient": [0, 0, 0], "PixelSpacing": [0.5, 0.5]},
    "Japanese": {
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
        "PatientName": "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
    },
    "lossy": {"LossyImageCompression": "01", "LossyImageCompressionRatio": 10},
    "oblong pixels": {"PixelAspectRatio": [1, 2]},
    "one frame": {"SOPClassUID": UltrasoundMultiFrameImageStorage, "NumberOfFrames": 1},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_as_they_come(film: Path, name: str) -> None:
    overlay, region = written(changed(film, **HEADERS[name]))
    source = dcmread(film)
    for found in (overlay, region):
        assert str(found.PatientName) == str(source.PatientName)
    assert sourced(region).ReferencedSOPClassUID == source.SOPClassUID
    assert ("FrameOfReferenceUID" in region) == (name == "whole")
    for kept in ("LossyImageCompression", "PixelAspectRatio"):
        assert overlay.get(kept) == source.get(kept)
    if CHECKER:
        checked(film.parent)


def test_a_map_without_region(film: Path) -> None:
    overlay, region = np.zeros((16, 24, 3), np.uint8), np.zeros((16, 24), bool)
    write_objects(film, None, overlay, region, "none", "", film.parent / "map")
    assert [path.name for path in film.parent.glob("map*")] == ["map_overlay.dcm"]


def test_a_file_of_no_study(film: Path) -> None:
    with pytest.raises(ValueError, match="belongs to no study, for want of StudyInstanceUID"):
        written(changed(film, StudyInstanceUID=""))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.skipif(CHECKER is None, reason="needs dciodvfy of dicom3tools")
def test_the_checker_finds_no_error(film: Path, frames: int) -> None:
    if frames > 1:
        frames_of(film, UltrasoundMultiFrameImageStorage)
    written(film, frames - 1 if frames > 1 else None)
    checked(film.parent)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
@pytest.mark.skipif(CHECKER is None, reason="needs dciodvfy of dicom3tools")
def test_the_checker_finds_no_error_on_real_files(path: Path, tmp_path: Path) -> None:
    written(Path(shutil.copy(path, tmp_path)))
    checked(tmp_path)


def checked(folder: Path) -> None:
    """Both objects have no error."""
    objects = sorted(folder.glob("map*.dcm"))
    assert len(objects) == 2
    for path in objects:
        told = subprocess.run([str(CHECKER), path], capture_output=True, text=True, check=False)
        lines = (told.stdout + told.stderr).splitlines()
        assert "SCImage" in lines or "Segmentation" in lines
        assert [line for line in lines if line.startswith(("Error", "Abort"))] == []
