"""A map as DICOM objects of the study that its picture came from."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import UID, AlgorithmIdentificationSequence
from highdicom.sc import SCImage
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    Segmentation,
    SegmentationTypeValues,
    SegmentDescription,
)
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from explainers.inference.card import own_version

MAKER = "SimAdv"
# Patient and study attributes that may be empty but must be there (type 2).
EXPECTED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
# Where a single frame lies in space.
PLACE = (
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
)
# Of the pixels, which the overlay inherits.
INHERITED = (
    "Laterality",
    "PixelAspectRatio",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "BurnedInAnnotation",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
)


def write_objects(
    source: Path,
    frame: int | None,
    overlay: NDArray[np.uint8],
    region: NDArray[np.bool_],
    label: str,
    settings: str,
    stem: Path,
) -> None:
    """Write <stem>_overlay.dcm (Secondary Capture) and <stem>_region.dcm (Segmentation).

    Without a region, as of a constant map, there is no Segmentation. Both keep the patient and the
    study, refer to the picture and its frame, and have its rows and columns. The maps of a series
    make one series for each kind of object.

    Args:
        source: DICOM file that was explained.
        frame: Which of its frames, from 0; None where it has one.
        overlay: Of the frame's rows and columns, (h, w, 3).
        region: (h, w), True where the map is relevant.
        label: What the region is, at most 64 characters.
        settings: Whatever changes the maps; other settings are other series.
        stem: Of the two files.

    Raises:
        ValueError: If the file lacks what a study needs. Other errors are highdicom's.

    Source: DICOM PS3.3 A.8.1 and A.51.
    """
    header = tidied(dcmread(source, stop_before_pixels=True))
    capture = secondary_capture(header, frame, overlay, settings)
    capture.save_as(stem.with_name(f"{stem.name}_overlay.dcm"), enforce_file_format=True)
    if region.any():
        mask = segmentation(header, frame, region, label, settings)
        mask.save_as(stem.with_name(f"{stem.name}_region.dcm"), enforce_file_format=True)


def tidied(header: Dataset) -> Dataset:
    """The header with empty values for what it lacks, without values that no reader may trust."""
    needed = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
    if missing := [name for name in needed if not header.get(name)]:
        raise ValueError(f"it belongs to no study, for want of {', '.join(missing)}")
    header.decode()
    header.SpecificCharacterSet = "ISO_IR 192"
    for name in EXPECTED:
        if name not in header:
            setattr(header, name, "")
    for name in PLACE:
        if name in header and not header.get(name):
            del header[name]
    header.Modality = header.get("Modality") or "OT"
    if not re.fullmatch(r"\d{3}[DWMY]", str(header.get("PatientAge", "000Y"))):
        del header.PatientAge
    if min(header.get("PixelSpacing", [1])) <= 0:
        del header.PixelSpacing
    return header


def secondary_capture(
    header: Dataset, frame: int | None, overlay: NDArray[np.uint8], settings: str
) -> Dataset:
    """The overlay as a picture that any viewer shows."""
    capture = SCImage.from_ref_dataset(
        header,
        overlay,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # demanded; what the source says comes below
        pixel_spacing=header.get("PixelSpacing"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **identity(header, frame, "overlay", settings),
    )
    capture.PatientOrientation = header.get("PatientOrientation", "")
    capture.Laterality = ""
    for name in INHERITED:
        if name in header:
            capture[name] = header[name]
    capture.SeriesDescription = "Explanation overlay, not for diagnosis"
    capture.DerivationDescription = "Explanation of a classifier's decision, laid over the image"
    capture.SourceImageSequence = [source_of(header, frame)]
    return capture


def segmentation(
    header: Dataset, frame: int | None, region: NDArray[np.bool_], label: str, settings: str
) -> Dataset:
    """The region as a segment over the frame."""
    one, pixels = copy.deepcopy(header), region[None]
    placed = in_space(header)
    if placed and frame is not None:
        pixels = np.zeros((int(header.NumberOfFrames), *region.shape), bool)
        pixels[frame] = region
    elif not placed:  # given as a picture of its own, without spacing: its source has that
        one.SOPClassUID = SecondaryCaptureImageStorage
        for name in PLACE:
            one.pop(name, None)
    algorithm = AlgorithmIdentificationSequence(
        MAKER, codes.DCM.ArtificialIntelligence, own_version()
    )
    segment = SegmentDescription(
        1,
        label,
        codes.SCT.SpatialAndRelationalConcept,
        codes.DCM.ImageRegion,
        SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm,
    )
    mask = Segmentation(
        [one],
        pixels,
        SegmentationTypeValues.BINARY,
        [segment],
        manufacturer_model_name=MAKER,
        software_versions=own_version(),
        device_serial_number="0",
        series_description="Explanation region, not for diagnosis",
        **identity(header, frame, "region", settings),
    )
    mask.PatientOrientation = header.get("PatientOrientation", "")
    if not placed:
        derived = mask.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
        derived.SourceImageSequence = [source_of(header, frame)]
        listed = mask.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
        listed.ReferencedSOPClassUID = header.SOPClassUID
    return mask


def in_space(header: Dataset) -> bool:
    """Whether the header tells where in the patient its frames lie."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return "NumberOfFrames" not in header and all(name in header for name in PLACE)
    groups = header.PerFrameFunctionalGroupsSequence
    places = all(group.get("PlanePositionSequence") for group in groups)
    return "FrameOfReferenceUID" in header and places


def identity(header: Dataset, frame: int | None, kind: str, settings: str) -> dict[str, Any]:
    """Series and instance of an object: one series for each series, kind and settings."""
    known = [header.SeriesInstanceUID, kind, settings]
    number = header.get("InstanceNumber") if frame is None else frame + 1
    return {
        "series_instance_uid": generate_uid(entropy_srcs=known),
        "series_number": 9000 + (kind == "region"),
        "sop_instance_uid": UID(),
        "instance_number": int(number or 1),
        "manufacturer": MAKER,
    }


def source_of(header: Dataset, frame: int | None) -> Dataset:
    """The reference to what was explained."""
    reference, purpose = Dataset(), Dataset()
    reference.ReferencedSOPClassUID = header.SOPClassUID
    reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
    if frame is not None:
        reference.ReferencedFrameNumber = frame + 1
    code = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator = code.value, code.scheme_designator
    purpose.CodeMeaning = code.meaning
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference
