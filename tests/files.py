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


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write (h, w) or (h, w, 3) as the ending says, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_dicom(path: Path, image: NDArray[np.uint8], compressed: bool = False) -> None:
    """Write an 8-bit grey file, uncompressed or as JPEG, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = FileDataset(path, {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
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
