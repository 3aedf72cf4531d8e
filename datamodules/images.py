"""Images and masks from PNG, JPEG, TIFF and DICOM files, as tensors at the size of the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from kornia.color import rgb_to_grayscale
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from pydicom import FileDataset, dcmread
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open

FORMATS = ("PNG", "JPEG", "TIFF")  # of Pillow's many formats, some run outside programs
GREY = {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"}
FRAME_HEADERS = {*range(0xFFC0, 0xFFD0)} - {0xFFC4, 0xFFC8, 0xFFCC} | {0xFFF7}  # JPEG, JPEG-LS
SCAN = 0xFFDA  # the marker behind JPEG's headers


class BadImage(ValueError):  # noqa: N818, it is what the option on_bad_image is about
    """An image file that cannot be read; the sentence names it."""


def read_image(
    path: Path | str,
    channels: Literal[1, 3],
    frame: int | None = None,
    content: bytes | None = None,
) -> Float[Tensor, "c h w"]:
    """Read a PNG, JPEG, TIFF or DICOM file at its own size.

    Grey files of 1, 8 and 16 bit, RGB, palette and CMYK are read, alpha is dropped, 16 bit colour
    comes down to 8 bit (Pillow) and an EXIF orientation is applied. DICOM: ``read_dicom``.

    Args:
        path: File; DICOM is known by its preamble or by the endings .dcm and .dicom.
        channels: 1 turns colour into grey (ITU-R 601), 3 repeats grey.
        frame: Which frame of a multi-frame TIFF or DICOM file, from 0.
        content: Of a file that lies in another one; the path is its name then.

    Returns:
        Values in [0, 1]: 0 is black, 1 the largest value that the file's bit depth can hold.

    Raises:
        BadImage: If the file is missing, damaged, of another format, of signed or floating-point
            values, larger than Pillow's limit against decompression bombs, or has several frames
            and ``frame`` is None.
    """
    image = _read(Path(path), frame, content)
    if channels == 3:
        return image.expand(3, -1, -1)
    return rgb_to_grayscale(image) if len(image) == 3 else image


def read_mask(path: Path | str, content: bytes | None = None) -> Bool[Tensor, "h w"]:
    """Read a mask at its own size: True where any channel of the image is not zero.

    Args:
        path: File.
        content: As ``read_image``.

    Raises:
        BadImage: As ``read_image``.
    """
    return torch.from_numpy(_read(Path(path), None, content).numpy().any(0))


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


def read_dicom(file: BufferedReader | BytesIO, frame: int | None = None) -> Float[Tensor, "c h w"]:
    """Read one frame of a DICOM file as it is meant to be shown: air dark, bone bright.

    Grey: modality LUT or rescale slope, then the VOI LUT or, if none, the first window. Without
    either, the whole range of the stored bits (not of the values met) becomes [0, 1], so that
    images of one device stay comparable. MONOCHROME1 is inverted. Colour: YBR and palette become
    RGB. Compressed files need the plugin of their transfer syntax (Pillow, pylibjpeg-openjpeg,
    python-gdcm).

    Returns:
        Values in [0, 1], 1 channel (grey) or 3 (RGB).

    Raises:
        ValueError: If there are several frames and ``frame`` is None, the image is larger than
            Pillow's limit, or what it holds is of another size or kind than its header says. Other
            errors are pydicom's.

    Source: DICOM PS3.3 C.7.6.3, C.11.1 and C.11.2.
    """
    check_deflated(file)
    dataset = dcmread(file)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames < 1:
        raise ValueError(f"it tells {frames} frames")
    frame = _choose_frame(frames, frame)
    _check_size(int(dataset.Rows) * int(dataset.Columns))
    _check_kind(dataset)
    _check_stream(dataset, frames, frame)
    syntax = dataset.file_meta.TransferSyntaxUID
    stored = pixel_array(dataset, index=frame, decoding_plugin=_plugin(syntax))
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colour = apply_color_lut(stored, dataset)
        return _to_tensor(colour / np.iinfo(colour.dtype).max)
    if dataset.SamplesPerPixel == 3:
        return _to_tensor(stored / (2**dataset.BitsStored - 1))
    shown = _shown(stored, dataset)
    if not np.isfinite(shown).all():
        raise ValueError("its rescaled values are not finite")
    return _to_tensor(shown)


def _read(path: Path, frame: int | None, content: bytes | None) -> Float[Tensor, "c h w"]:
    """Image with the channels of its file; every failure becomes one sentence."""
    try:
        return _decode(path, frame, content)
    except UnidentifiedImageError as error:  # Pillow's words would tell an address in memory
        raise BadImage(f"Image {path} cannot be read: it is no {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise BadImage(f"Image {path} cannot be read: {reason}.") from error


def _decode(path: Path, frame: int | None, content: bytes | None) -> Float[Tensor, "c h w"]:
    if content is None and not path.is_file():
        raise ValueError("there is no such file")
    with path.open("rb") if content is None else BytesIO(content) as file:
        preamble = file.read(132)
        file.seek(0)
        if path.suffix.lower() in {".dcm", ".dicom"} or preamble[128:] == b"DICM":
            return read_dicom(file, frame)
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.width * image.height)  # Pillow only warns up to twice its limit
            if image.format != "PNG":
                return _to_tensor(_values(image, frame))
            image.verify()  # the checksums, which Pillow leaves out when it reads pixels
        file.seek(0)
        with Image.open(file, formats=["PNG"]) as image:
            return _to_tensor(_values(image, frame))


def _check_size(pixels: int) -> None:
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it has {pixels} pixels, more than the limit {Image.MAX_IMAGE_PIXELS}")


def check_deflated(file: BufferedReader | BytesIO) -> None:
    """Refuse a deflated DICOM file that is too large: pydicom inflates the whole of it.

    Raises:
        ValueError: If it has more than four bytes for each pixel of Pillow's limit.
    """
    read_preamble(file, force=False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while data := inflate.unconsumed_tail or file.read(1 << 16):
            size += len(inflate.decompress(data, 1 << 20))
            _check_size(size // 4)  # of up to four bytes each
    file.seek(0)


def _check_kind(dataset: FileDataset) -> None:
    """Refuse what the values cannot be told from."""
    if "PixelData" not in dataset:
        raise ValueError("it has no pixel data, or floating-point ones, which are not read")
    kind, samples = dataset.PhotometricInterpretation, dataset.SamplesPerPixel
    colour = kind == "RGB" or str(kind).startswith("YBR_")
    if not ((kind in GREY and samples == 1) or (colour and samples == 3)):
        raise ValueError(
            f"photometric interpretation {kind!r} with {samples} sample(s) a pixel is not known"
        )
    allocated, stored = dataset.BitsAllocated, dataset.BitsStored
    compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    known = {8, 16} if compressed else {1, 8, 16, 32}  # others end the process inside GDCM
    if allocated not in known or not 1 <= stored <= allocated:
        raise ValueError(f"{allocated} allocated and {stored} stored bits are not read")
    if not compressed and len(dataset.PixelData) >= 2 * get_expected_length(dataset):
        raise ValueError("it holds at least twice the pixels that its header tells")


def _check_stream(dataset: FileDataset, frames: int, frame: int) -> None:
    """Refuse a compressed frame of another size: decoders believe it and not the header."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    tables = [dataset.get(f"ExtendedOffsetTable{name}") for name in ("", "Lengths")]
    offsets = (tables[0], tables[1]) if all(tables) else None
    stream = get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    if syntax == RLELossless:
        pixels, expected = _rle_pixels(stream), dataset.Rows * dataset.Columns
        if not expected <= pixels <= expected + 2:  # a segment of odd length is padded
            raise ValueError(f"its compressed frame has {pixels} pixels, not {expected}")
        return
    found, told = _stream_shape(stream), (dataset.Rows, dataset.Columns, dataset.BitsAllocated)
    if found[:2] != told[:2] or found[2] > told[2]:
        raise ValueError(
            f"its compressed frame has (height, width, bits) {found}, but its header says {told}"
        )


def _rle_pixels(stream: bytes) -> int:
    """Bytes that the first segment of an RLE frame unpacks to, one of each pixel."""
    segments, place, following = struct.unpack_from("<III", stream)
    end, pixels = following if segments > 1 else len(stream), 0
    while place < min(end, len(stream)):
        code = stream[place]
        pixels += code + 1 if code < 128 else (257 - code) % 129  # as they are, or one repeated
        place += code + 2 if code < 128 else 2 if code > 128 else 1
    return pixels


def _plugin(syntax: UID) -> str:
    """Decoder of a compressed syntax: GDCM, pydicom's first choice, is the last one here.

    On damaged streams it ends the process.
    """
    order = ("pylibjpeg", "pillow", "pydicom", "gdcm")
    available = get_decoder(syntax).available_plugins
    return next((name for name in order if name in available), "")


def _stream_shape(stream: bytes) -> tuple[int, int, int]:
    """Height, width and bits by the headers of a JPEG, JPEG-LS or JPEG 2000 stream."""
    if not stream.startswith(b"\xff\xd8"):
        place = stream.index(b"\xff\x4f\xff\x51")  # start of codestream, then its sizes
        right, bottom, left, top = struct.unpack_from(">IIII", stream, place + 8)
        return bottom - top, right - left, (stream[place + 42] & 127) + 1
    place, shape = 2, (0, 0, 0)
    while (marker := int.from_bytes(stream[place : place + 2])) != SCAN:
        if marker == 0xFFFF:  # a byte that fills
            place += 1
            continue
        length, bits, height, width = struct.unpack_from(">HBHH", stream, place + 2)
        if marker < 0xFFC0 or length < 2:
            raise ValueError("its JPEG headers are damaged")
        if marker in FRAME_HEADERS:
            shape = height, width, bits
        place += 2 + length
    return shape


def _choose_frame(frames: int, frame: int | None) -> int:
    if frame is None and frames > 1:
        raise ValueError(f"it has {frames} frames, give the one to read (0 to {frames - 1})")
    if frame is not None and not 0 <= frame < frames:
        raise ValueError(f"frame must be in 0 to {frames - 1}, but got {frame}")
    return frame or 0


def _values(image: Image.Image, frame: int | None) -> NDArray[np.floating]:
    """Values in [0, 1] of a Pillow image, (h, w) or (h, w, 3)."""
    # Extra frames of PNG and JPEG are animations and previews; the first is the picture.
    frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    image.seek(_choose_frame(frames, frame))
    kind, mode = image.format, image.mode
    upright = ImageOps.exif_transpose(image)
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillow: "I"
        values = np.asarray(upright, np.float32) / _largest(image)
        return 1 - values if _white_is_zero(image) else values
    if mode in {"I", "F"}:
        raise ValueError(
            "its values are signed, floating-point or of 32 bit, only unsigned 1 to 16 bit are read"
        )
    grey = mode in {"1", "L", "LA", "La"}
    values = np.asarray(upright.convert("L" if grey else "RGB"), np.float32)
    return np.divide(values, 255, out=values)  # in place, as an image may have a GiB


def _largest(image: Image.Image) -> int:
    """Of the values of more than 8 bit; a TIFF file may have 12."""
    return 2 ** image.tag_v2[BITSPERSAMPLE][0] - 1 if isinstance(image, TiffImageFile) else 65535


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file counts from white; Pillow minds it up to 8 bit, but not in 16."""
    return isinstance(image, TiffImageFile) and image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0


def _to_tensor(values: NDArray[np.floating]) -> Float[Tensor, "c h w"]:
    # In numpy, as torch's threads slow down such small work on a machine that is busy.
    planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    image = np.ascontiguousarray(planes, np.float32)
    return torch.from_numpy(np.clip(image, 0, 1, out=image))


def _shown(stored: NDArray[np.generic], dataset: FileDataset) -> NDArray[np.float64]:
    """Grey values as shown, 0 black to 1 white."""
    values = apply_modality_lut(stored, dataset)
    low, high = _modality_range(dataset)
    if dataset.get("VOILUTSequence"):
        values = apply_voi(values, dataset)
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif dataset.get("WindowWidth"):
        window = [dataset.WindowCenter, dataset.WindowWidth]
        if not all(np.isfinite(np.asarray(each, float)).all() for each in window):
            raise ValueError(f"its window {window} is not finite")
        values = apply_windowing(values, dataset)  # puts the dark end at low, even if low > high
    else:
        low, high = min(low, high), max(low, high)
    shown = (values.astype(np.float64) - low) / (high - low)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _modality_range(dataset: FileDataset) -> tuple[float, float]:
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
