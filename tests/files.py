"""Image files written at test time."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

from datamodules.isic import ATTRIBUTES


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write (h, w) or (h, w, 3) as the ending says, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_dicom(path: Path, image: NDArray[np.uint8], compressed: bool = False) -> None:
    """Write an 8-bit grey file, uncompressed or as JPEG, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = FileDataset(path, {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.1", "1.2.2"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = image.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = image.tobytes()
    if compressed:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path, enforce_file_format=True)


def write_features(folder: Path, part: str, name: str) -> None:
    """Globules in the upper half, streaks at the left; the outline is the middle."""
    write_image(
        folder / f"ISIC2018_Task1-2_{part}_Input" / f"{name}.jpg",
        np.full((16, 16, 3), 51, np.uint8),
    )
    masks = {attribute: np.zeros((16, 16), np.uint8) for attribute in ATTRIBUTES}
    masks["globules"][:8] = 255
    masks["streaks"][:, :4] = 255
    suffix = "_v3" if part == "Training" else ""
    for attribute, mask in masks.items():
        truth = folder / f"ISIC2018_Task2_{part}_GroundTruth{suffix}"
        write_image(truth / f"{name}_attribute_{attribute}.png", mask)
    outline = np.zeros((16, 16), np.uint8)
    outline[4:12, 4:12] = 255
    truth = folder / f"ISIC2018_Task1_{part}_GroundTruth"
    write_image(truth / f"{name}_segmentation.png", outline)


def write_isic(folder: Path) -> None:
    """Tasks 1 and 2 of ISIC 2018: a nevus, a melanoma and a keratosis in each part."""
    lines = ["image_id,melanoma,seborrheic_keratosis"]
    for first, part in ((0, "Training"), (10, "Validation"), (20, "Test")):
        for k, columns in enumerate(("0.0,0.0", "1.0,0.0", "0.0,1.0")):
            name = f"ISIC_{first + k:07d}"
            write_features(folder, part, name)
            lines.append(f"{name},{columns}")
    table = folder / "ISIC-2017_Training_Part3_GroundTruth.csv"
    table.write_text("\n".join(lines) + "\n")
