"""Images and masks from PNG, JPEG, TIFF and DICOM files, as tensors at the size of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from kornia.color import rgb_to_grayscale
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile
from pydicom import Dataset, dcmread
from pydicom.misc import is_dicom
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)
from pydicom.pixels.utils import pixel_array
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open

FORMATS = ("PNG", "JPEG", "TIFF")  # of Pillow's many formats, some run outside programs


def read_image(
    path: Path | str, channels: Literal[1, 3], frame: int | None = None
) -> Float[Tensor, "c h w"]:
    """Read a PNG, JPEG, TIFF or DICOM file at its own size.

    Grey files of 1, 8 and 16 bit, RGB, palette and CMYK are read, alpha is dropped, 16 bit colour
    comes down to 8 bit (Pillow) and an EXIF orientation is applied. DICOM: ``read_dicom``.

    Args:
        path: File; DICOM is known by its preamble or by the endings .dcm and .dicom.
        channels: 1 turns colour into grey (ITU-R 601), 3 repeats grey.
        frame: Which frame of a multi-frame TIFF or DICOM file, from 0.

    Returns:
        Values in [0, 1]: 0 is black, 1 the largest value that the file's bit depth can hold.

    Raises:
        ValueError: If the file is missing, damaged, of another format, larger than Pillow's limit
            against decompression bombs, or has several frames and ``frame`` is None.
    """
    image = _read(Path(path), frame)
    if channels == 3:
        return image.expand(3, -1, -1)
    return rgb_to_grayscale(image) if len(image) == 3 else image


def read_mask(path: Path | str) -> Bool[Tensor, "h w"]:
    """Read a mask at its own size: True where any channel of the image is not zero.

    Raises:
        ValueError: As ``read_image``.
    """
    return torch.from_numpy(_read(Path(path), None).numpy().any(0))


def resize_image(image: Float[Tensor, "c h w"], size: int) -> Float[Tensor, "c size size"]:
    """Antialiased bilinear resizing to a square, values kept in [0, 1]; aspect is not kept."""
    resized: Tensor = resize(image, [size, size], antialias=True)
    return resized.clamp(0, 1)


def resize_mask(mask: Bool[Tensor, "h w"], size: int) -> Bool[Tensor, "size size"]:
    """Area average to a square, True from a share of one half on.

    A mask that is not empty never vanishes: where no pixel reaches one half, those of the largest
    share are True.
    """
    share = interpolate(mask[None, None].float(), (size, size), mode="area")[0, 0]
    return (share >= min(0.5, float(share.max()))) & (share > 0)


def boxes_to_mask(
    boxes: Sequence[Box], height: int, width: int, size: int
) -> Bool[Tensor, "size size"]:
    """Union of boxes of a ``height`` x ``width`` image, drawn on a square of ``size`` pixels.

    A pixel is inside if its centre is inside the scaled box. A box that holds no centre takes the
    pixel in which its own centre lies, so that it never vanishes.
    """
    mask = torch.zeros(size, size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask |= _inside(y0, y1, height, size)[:, None] & _inside(x0, x1, width, size)
    return mask


def read_dicom(path: Path, frame: int | None = None) -> Float[Tensor, "c h w"]:
    """Read one frame of a DICOM file as it is meant to be shown: air dark, bone bright.

    Grey: modality LUT or rescale slope, then the VOI LUT or, if none, the first window. Without
    either, the whole range of the stored bits (not of the values met) becomes [0, 1], so that
    images of one device stay comparable. MONOCHROME1 is inverted. Colour: YBR and palette become
    RGB. Compressed files need the plugin of their transfer syntax (Pillow, pylibjpeg-openjpeg,
    python-gdcm).

    Returns:
        Values in [0, 1], 1 channel (grey) or 3 (RGB).

    Raises:
        ValueError: If there are several frames and ``frame`` is None, or the image is larger than
            Pillow's limit. Other errors are pydicom's.

    Source: DICOM PS3.3 C.7.6.3, C.11.1 and C.11.2.
    """
    dataset = dcmread(path)
    frame = _choose_frame(int(dataset.get("NumberOfFrames") or 1), frame)
    _check_size(int(dataset.Rows) * int(dataset.Columns))
    stored = pixel_array(dataset, index=frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colour = apply_color_lut(stored, dataset)
        return _to_tensor(colour / np.iinfo(colour.dtype).max)
    if dataset.SamplesPerPixel == 3:
        return _to_tensor(stored / (2**dataset.BitsStored - 1))
    return _to_tensor(_shown(stored, dataset))


def _read(path: Path, frame: int | None) -> Float[Tensor, "c h w"]:
    """Image with the channels of its file; every failure becomes one sentence."""
    try:
        return _decode(path, frame)
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"Image {path} cannot be read: {reason}.") from error


def _decode(path: Path, frame: int | None) -> Float[Tensor, "c h w"]:
    if not path.is_file():
        raise ValueError("there is no such file")
    if path.suffix.lower() in {".dcm", ".dicom"} or is_dicom(path):
        return read_dicom(path, frame)
    with Image.open(path, formats=FORMATS) as image:
        pixels = image.width * image.height  # Pillow itself only warns up to twice its limit
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"it has {pixels} pixels, more than the limit {Image.MAX_IMAGE_PIXELS}"
            )
        # Extra frames of PNG and JPEG are animations and previews; the first is the picture.
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        image.seek(_choose_frame(frames, frame))
        return _to_tensor(_values(image))


def _check_size(pixels: int) -> None:
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it has {pixels} pixels, more than the limit {Image.MAX_IMAGE_PIXELS}")


def _choose_frame(frames: int, frame: int | None) -> int:
    if frame is None and frames > 1:
        raise ValueError(f"it has {frames} frames, give the one to read (0 to {frames - 1})")
    if frame is not None and not 0 <= frame < frames:
        raise ValueError(f"frame must be in 0 to {frames - 1}, but got {frame}")
    return frame or 0


def _values(image: Image.Image) -> NDArray[np.floating]:
    """Values in [0, 1] of a Pillow image, (h, w) or (h, w, 3)."""
    kind, mode = image.format, image.mode
    upright = ImageOps.exif_transpose(image)
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillow: "I"
        values = np.asarray(upright, np.float32) / 65535
        return 1 - values if _white_is_zero(image) else values
    if mode in {"I", "F"}:
        raise ValueError("its values are signed or have 32 bit, only unsigned 1 to 16 bit are read")
    grey = mode in {"1", "L", "LA", "La"}
    return np.asarray(upright.convert("L" if grey else "RGB"), np.float32) / 255


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file counts from white; Pillow minds it up to 8 bit, but not in 16."""
    return isinstance(image, TiffImageFile) and image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0


def _to_tensor(values: NDArray[np.floating]) -> Float[Tensor, "c h w"]:
    # In numpy, as torch's threads slow down such small work on a machine that is busy.
    image = values.astype(np.float32).clip(0, 1)
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))


def _shown(stored: NDArray[np.generic], dataset: Dataset) -> NDArray[np.float64]:
    """Grey values as shown, 0 black to 1 white."""
    values = apply_modality_lut(stored, dataset)
    low, high = _modality_range(dataset)
    if dataset.get("VOILUTSequence"):
        values = apply_voi(values, dataset)
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif dataset.get("WindowWidth"):
        values = apply_windowing(values, dataset)  # puts the dark end at low, even if low > high
    else:
        low, high = min(low, high), max(low, high)
    shown = (values.astype(np.float64) - low) / (high - low)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _modality_range(dataset: Dataset) -> tuple[float, float]:
    """What the smallest and the largest storable value become by the modality transform."""
    if dataset.get("ModalityLUTSequence"):
        return 0, 2 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    signed = dataset.PixelRepresentation == 1
    low = -(2 ** (dataset.BitsStored - 1)) if signed else 0
    slope = float(dataset.get("RescaleSlope", 1))
    if slope == 0:
        raise ValueError("its rescale slope is 0, so that all pixels are equal")
    intercept = float(dataset.get("RescaleIntercept", 0))
    return slope * low + intercept, slope * (low + 2**dataset.BitsStored - 1) + intercept


def _inside(low: float, high: float, extent: int, size: int) -> Bool[Tensor, " size"]:
    """Which of ``size`` pixels along an axis of ``extent`` have their centre in [low, high)."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * extent / size
    inside = (centre >= low) & (centre < high)
    if not inside.any():
        inside[min(int((low + high) / 2 * size / extent), size - 1)] = True
    return inside
