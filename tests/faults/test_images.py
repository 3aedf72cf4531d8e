"""Broken and hostile image files: each is read right, or refused in one sentence that names it."""

from __future__ import annotations

import multiprocessing
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, FileDataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from datamodules.base import data_root
from datamodules.images import read_image

pytestmark = pytest.mark.faults

SECONDS, MEBIBYTES = 20, 600  # of one file: what it may take, and by how much memory may grow
SHAPE = (20, 24)

Pixels = NDArray[np.float32]
Mutate = Callable[[np.random.Generator], "Case"]


class Case(NamedTuple):
    """A file, and what reading it as RGB must give.

    Attributes:
        name: Of the file, with its ending.
        content: Of the file.
        pixels: What may be read, (3, h, w) in [0, 1]; None is anything that is an image.
        outcome: "read", "refused", or "either" of the two.
    """

    name: str
    content: bytes
    pixels: Pixels | None
    outcome: str


# --- intact files, and what they hold ---------------------------------------------------------


def grey(bits: int = 8) -> NDArray[np.uint16]:
    """A smooth picture with some noise, of 0 to 2**bits - 1."""
    slope = np.add.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1])) / (sum(SHAPE) - 2)
    noise = np.random.default_rng(bits).uniform(-0.05, 0.05, SHAPE)
    return ((slope + noise).clip(0, 1) * (2**bits - 1)).round().astype(np.uint16)


def colour() -> NDArray[np.uint8]:
    """Three pictures that differ, (h, w, 3)."""
    first = grey().astype(np.uint8)
    return np.stack([first, first[::-1], first[:, ::-1]], -1)


def planes(values: NDArray[np.generic], largest: int) -> Pixels:
    """(h, w) or (h, w, 3) as RGB, (3, h, w) in [0, 1]."""
    image = values.astype(np.float32) / largest
    return np.stack([image] * 3) if image.ndim == 2 else image.transpose(2, 0, 1)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(tags: dict[int, tuple[int, Sequence[int]]], data: bytes) -> bytes:
    """A little-endian TIFF of one strip, of tags with their type (3 short, 4 long)."""
    tags = tags | {273: (4, [8]), 278: (4, [SHAPE[0]]), 279: (4, [len(data)])}
    directory, beside = b"", b""
    place = 8 + len(data)
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            at = place + 6 + 12 * len(tags) + len(beside)
            beside, packed = beside + packed, struct.pack("<I", at)
        directory += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", place)
    return head + data + struct.pack("<H", len(tags)) + directory + bytes(4) + beside


def shape_tags(bits: int, **more: int) -> dict[int, tuple[int, Sequence[int]]]:
    """Width, height, bits, no compression, black is zero, one sample; sample format by name."""
    tags = {256: SHAPE[1], 257: SHAPE[0], 258: bits, 259: 1, 262: 1, 277: 1} | (
        {339: more["form"]} if more else {}
    )
    return {tag: (3, [value]) for tag, value in tags.items()}


def packed12(values: NDArray[np.uint16]) -> bytes:
    """Two values of 12 bit in three bytes."""
    first, second = values.ravel()[::2], values.ravel()[1::2]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, -1).astype(np.uint8).tobytes()


def dicom(values: NDArray[np.generic], syntax: UID = ExplicitVRLittleEndian) -> FileDataset:
    """A small grey (h, w) or colour (h, w, 3) picture with what a scanner would add."""
    bits = values.dtype.itemsize * 8
    little, meta = syntax.is_little_endian, FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    file = FileDataset("", {}, b"\0" * 128, meta, syntax.is_implicit_VR, little)
    file.SOPClassUID, file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    file.PatientName, file.PatientID, file.StudyDate = "Doe^Jane", "4711", "20200229"
    file.Modality, file.InstanceNumber = "CR", 1
    file.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    file.SamplesPerPixel = 1 if values.ndim == 2 else 3
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    file.Rows, file.Columns = values.shape[:2]
    file.BitsAllocated, file.BitsStored, file.HighBit = bits, bits, bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.astype(values.dtype.newbyteorder("<" if little else ">")).tobytes()
    file["PixelData"].VR = "OB" if bits == 8 else "OW"
    return file


def written(file: Dataset) -> bytes:
    buffer = BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(values: NDArray[np.uint8], syntax: UID, stream: bytes) -> FileDataset:
    file = dicom(values)
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([stream])
    file["PixelData"].VR = "OB"
    file["PixelData"].is_undefined_length = True
    return file


class Seed(NamedTuple):
    """An intact file, and what it holds as RGB."""

    name: str
    content: bytes
    pixels: Pixels


@cache
def seeds() -> list[Seed]:
    """Intact files of every kind that is read."""
    byte, word, rgb = grey().astype(np.uint8), grey(16), colour()
    g, c, large = planes(byte, 255), planes(rgb, 255), planes(word, 65535)
    plain, many = Image.fromarray(byte), Image.fromarray(rgb)
    bits = byte > 127
    one = Image.fromarray(bits)
    palette = many.quantize(64)
    coloured = planes(np.asarray(palette.convert("RGB")), 255)
    ink = np.dstack([255 - rgb, np.zeros(SHAPE, np.uint8)])
    alpha = many.convert("RGBA")
    alpha.putalpha(plain)
    twelve = grey(12)
    found = [
        Seed("grey.png", saved(plain, "PNG"), g),
        Seed("text.png", saved(plain, "PNG", dpi=(72, 72), icc_profile=b"x" * 200), g),
        Seed("word.png", saved(Image.fromarray(word), "PNG"), large),
        Seed("one.png", saved(one, "PNG"), planes(bits, 1)),
        Seed("palette.png", saved(palette, "PNG"), coloured),
        Seed("clear.png", saved(palette, "PNG", transparency=3), coloured),
        Seed("alpha.png", saved(alpha, "PNG"), c),
        Seed("veiled.png", saved(alpha.convert("LA"), "PNG"), luma(rgb)),
        Seed("colour.png", saved(many, "PNG"), c),
        Seed("grey.tif", saved(plain, "TIFF"), g),
        Seed("word.tif", saved(Image.fromarray(word), "TIFF"), large),
        Seed("colour.tif", saved(many, "TIFF"), c),
        Seed("lzw.tif", saved(many, "TIFF", compression="tiff_lzw"), c),
        Seed("deflate.tiff", saved(plain, "TIFF", compression="tiff_adobe_deflate"), g),
        Seed("packbits.tif", saved(plain, "TIFF", compression="packbits"), g),
        Seed(
            "fax.tif", saved(Image.fromarray(bits), "TIFF", compression="group4"), planes(bits, 1)
        ),
        Seed("ink.tif", saved(Image.fromarray(ink, "CMYK"), "TIFF"), c),
        Seed("alpha.tif", saved(alpha, "TIFF"), c),
        Seed("palette.tif", saved(palette, "TIFF"), coloured),
        Seed("white.tif", tiff(shape_tags(8) | {262: (3, [0])}, byte.tobytes()), 1 - g),
        Seed("twelve.tif", tiff(shape_tags(12), packed12(twelve)), planes(twelve, 4095)),
        Seed("grey.dcm", written(dicom(byte)), g),
        Seed("word.dcm", written(dicom(word)), large),
        Seed("signed.dcm", written(dicom((word.astype(np.int32) - 2**15).astype(np.int16))), large),
        Seed("colour.dcm", written(dicom(rgb)), c),
        Seed("implicit.dcm", written(dicom(word, ImplicitVRLittleEndian)), large),
        Seed("big.dcm", written(dicom(word, ExplicitVRBigEndian)), large),
        Seed("deflated.dcm", written(dicom(word, DeflatedExplicitVRLittleEndian)), large),
        Seed("twelve.dcm", written(shallow(twelve)), planes(twelve, 4095)),
        Seed("unnamed", written(dicom(byte)), g),
    ]
    for name, picture, options in (
        ("grey.jpg", plain, {}),
        ("colour.jpg", many, {"subsampling": 0}),
        ("progressive.jpeg", many, {"progressive": True}),
        ("ink.jpg", Image.fromarray(ink, "CMYK"), {}),
    ):
        content = saved(picture, "JPEG", quality=98, **options)
        found.append(Seed(name, content, decoded(content)))
    lossless = dicom(byte)
    lossless.compress(RLELossless, encoding_plugin="pydicom")
    found.append(Seed("rle.dcm", written(lossless), g))
    stream = saved(plain, "JPEG2000", no_jp2=True)
    found.append(Seed("wave.dcm", written(compressed(byte, JPEG2000Lossless, stream)), g))
    stream = saved(plain, "JPEG", quality=98)
    found.append(
        Seed("jpeg.dcm", written(compressed(byte, JPEGBaseline8Bit, stream)), decoded(stream))
    )
    return found


def decoded(content: bytes) -> Pixels:
    return planes(np.asarray(Image.open(BytesIO(content)).convert("RGB")), 255)


def luma(rgb: NDArray[np.uint8]) -> Pixels:
    return planes(np.asarray(Image.fromarray(rgb).convert("L")), 255)


def shallow(twelve: NDArray[np.uint16]) -> FileDataset:
    file = dicom(twelve)
    file.BitsStored, file.HighBit = 12, 11
    return file


# --- mutations --------------------------------------------------------------------------------


def intact(rng: np.random.Generator) -> Case:
    seed = pick(rng)
    return Case(seed.name, seed.content, seed.pixels, "read")


def pick(rng: np.random.Generator, ending: str = "") -> Seed:
    chosen = [seed for seed in seeds() if seed.name.endswith(ending)]
    return chosen[rng.integers(len(chosen))]


def cut(rng: np.random.Generator) -> Case:
    """Only the beginning; what is read all the same must be the whole picture."""
    seed = pick(rng)
    length = int(rng.integers(len(seed.content)))
    if rng.random() < 0.3:
        length = len(seed.content) - 1 - int(rng.integers(12))
    return Case(seed.name, seed.content[:length], seed.pixels, "either")


def empty(rng: np.random.Generator) -> Case:
    seed = pick(rng)
    return Case(
        seed.name, b"" if rng.random() < 0.5 else bytes(int(rng.integers(400))), None, "refused"
    )


def flipped(rng: np.random.Generator) -> Case:
    """Random bytes; PNG has checksums, so that it may be read only if they are of no matter."""
    seed = pick(rng)
    content = bytearray(seed.content)
    reach = len(content) if rng.random() < 0.5 else min(len(content), 500)
    for place in rng.integers(reach, size=int(rng.integers(1, 12))):
        content[place] = rng.integers(256)
    pixels = seed.pixels if seed.name.endswith(".png") else None
    return Case(seed.name, bytes(content), pixels, "either")


def blanked(rng: np.random.Generator) -> Case:
    """A stretch of zeros or of noise, or a stretch that comes twice or is left out."""
    seed = pick(rng)
    content, size = seed.content, len(seed.content)
    a, b = sorted(rng.integers(size, size=2).tolist())
    middle = [bytes(b - a), rng.bytes(b - a), content[a:b] * 2, b""][rng.integers(4)]
    changed = content[:a] + middle + content[b:]
    pixels = seed.pixels if seed.name.endswith(".png") else None
    return Case(seed.name, changed, pixels, "either")


def foreign(rng: np.random.Generator) -> Case:
    """The head of one file on the body of another, or one under the ending of another."""
    one, other = pick(rng), pick(rng)
    if rng.random() < 0.5:
        at = int(rng.integers(1, 200))
        return Case(one.name, one.content[:at] + other.content[at:], None, "either")
    tail = Path(one.name).suffix
    forced = tail == ".dcm" and not other.name.endswith((".dcm", "unnamed"))
    return Case(
        f"x{tail}", other.content, None if forced else other.pixels, "refused" if forced else "read"
    )


def text(rng: np.random.Generator) -> Case:
    endings = [".png", ".jpg", ".tif", ".dcm", ""]
    contents = [
        b"no image",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"II*\0\x08\0\0\0",
        b"MM\0*",
        bytes(128) + b"DICM",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a" + bytes(40),
        b"P6 9999 9999 255\n",
    ]
    content = contents[rng.integers(len(contents))]
    return Case(f"x{endings[rng.integers(5)]}", content, None, "refused")


def trailing(rng: np.random.Generator) -> Case:
    """Something behind the end; DICOM reads on there, the others stop."""
    seed = pick(rng)
    junk = rng.bytes(int(rng.integers(1, 300)))
    sure = not seed.name.endswith(("dcm", "unnamed"))
    return Case(seed.name, seed.content + junk, seed.pixels, "read" if sure else "either")


@cache
def zeros(mebibytes: int, wbits: int) -> bytes:
    deflate = zlib.compressobj(1, wbits=wbits)
    parts = [deflate.compress(bytes(1 << 20)) for _ in range(mebibytes)]
    return b"".join(parts) + deflate.flush()


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(rng: np.random.Generator) -> Case:
    """A valid header of absurd size, depth or kind."""
    seed = pick(rng, ".png")
    width, height, depth, kind = struct.unpack(">IIBB", seed.content[16:26])
    absurd = [0, 2**31 - 1, 2**32 - 1, 5 * 10**6, 10**7]
    what = rng.integers(4)
    if what == 0:
        width = absurd[rng.integers(5)]
    elif what == 1:
        height = absurd[rng.integers(5)]
    elif what == 2:
        width = height = absurd[rng.integers(5)]
    else:
        depth, kind = int(rng.integers(256)), int(rng.integers(8))
    data = struct.pack(">IIBB", width, height, depth, kind) + seed.content[26:29]
    outcome = "refused" if what < 3 else "either"
    changed = seed.content[:8] + chunk(b"IHDR", data) + seed.content[33:]
    same = changed == seed.content
    return Case(seed.name, changed, seed.pixels if same else None, "read" if same else outcome)


def png_stored(rng: np.random.Generator) -> Case:
    """One byte of pixels that are not compressed: only the checksum tells."""
    content = bytearray(saved(Image.fromarray(colour()), "PNG", compress_level=0))
    start = content.index(b"IDAT") + 11  # behind the headers of the stream and of its block
    content[start + int(rng.integers(1, 1000))] ^= 1 << int(rng.integers(8))
    return Case("x.png", bytes(content), None, "refused")


def png_bomb(rng: np.random.Generator) -> Case:
    """700 MiB of text or of a colour profile in less than one."""
    seed = pick(rng, ".png")
    bomb = zeros(700, 15)
    kinds = {
        b"zTXt": b"a\0\0" + bomb,
        b"iTXt": b"a\0\1\0\0\0" + bomb,
        b"iCCP": b"a\0\0" + bomb,
    }
    name = list(kinds)[rng.integers(3)]
    content = seed.content[:33] + chunk(name, kinds[name]) + seed.content[33:]
    return Case(seed.name, content, seed.pixels, "either")


def png_picture_bomb(rng: np.random.Generator) -> Case:
    """A picture of more pixels than are allowed, all of them there, in a few KiB."""
    side = [9500, 70000][rng.integers(2)]
    data = zeros(side * ((side + 7) // 8 + 1) // 2**20 + 1, 15)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return Case("x.png", b"\x89PNG\r\n\x1a\n" + b"".join(parts), None, "refused")


def tiff_tag(rng: np.random.Generator) -> Case:
    """One tag of a TIFF with an absurd value."""
    bits = [8, 16][rng.integers(2)]
    tags = shape_tags(bits)
    tag = [256, 257, 258, 259, 262, 277, 284, 322, 323, 339, 338, 317, 266][rng.integers(13)]
    value = [0, 2, 3, 5, 7, 32, 64, 1000, 65535, 2**31 - 1, 2**32 - 1][rng.integers(11)]
    tags[tag] = (4, [value])
    if tag in {322, 323}:
        tags |= {322: (4, [value]), 323: (4, [value]), 324: (4, [8])}
    data = grey(bits).astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    return Case("x.tif", tiff(tags, data), None, "either")


def tiff_float(rng: np.random.Generator) -> Case:
    """32 bit or signed values, with NaN."""
    values = grey().astype(np.float32) / 255
    values[3, 4] = [np.nan, np.inf, 0.5][rng.integers(3)]
    form = int(rng.integers(1, 4))
    return Case("x.tif", tiff(shape_tags(32, form=form), values.tobytes()), None, "refused")


def tiff_ring(rng: np.random.Generator) -> Case:
    """Directories that follow each other in a ring, or very many frames."""
    content = saved(Image.fromarray(grey().astype(np.uint8)), "TIFF")
    if rng.random() < 0.5:
        at = struct.unpack("<I", content[4:8])[0]
        count = struct.unpack("<H", content[at : at + 2])[0]
        end = at + 2 + 12 * count
        return Case("x.tif", content[:end] + content[4:8] + content[end + 4 :], None, "either")
    frames = [Image.fromarray(grey().astype(np.uint8))] * int(rng.integers(1, 60))
    return Case(
        "x.tif", saved(frames[0], "TIFF", save_all=True, append_images=frames), None, "refused"
    )


def jpeg_size(rng: np.random.Generator) -> Case:
    """Another size in the frame header."""
    seed = pick(rng, ".jpg")
    content = bytearray(seed.content)
    at = re.search(rb"\xff[\xc0\xc2]\x00", seed.content)
    assert at
    sides = [(0, 24), (65500, 65500), (65535, 20), (20, 65535), (9500, 9500)]
    content[at.start() + 5 : at.start() + 9] = struct.pack(">HH", *sides[rng.integers(5)])
    return Case(seed.name, bytes(content), None, "refused")


ABSURD = {
    "Rows": [0, 1, 65535, 30000],
    "Columns": [0, 1, 65535, 30000],
    "NumberOfFrames": [-1, 2, 1000, 2**31 - 1, 2000000000],
    "BitsAllocated": [0, 7, 32, 64, 65535],
    "BitsStored": [0, 1, 12, 33, 65535],
    "HighBit": [0, 200, 65535],
    "SamplesPerPixel": [0, 2, 3, 4, 65535],
    "PixelRepresentation": [2, 65535],
    "PlanarConfiguration": [2, 1],
    "PhotometricInterpretation": [
        "RGB",
        "YBR_FULL",
        "YBR_FULL_422",
        "PALETTE COLOR",
        "HSV",
        "CMYK",
        "NONSENSE",
        "",
        "MONOCHROME3",
    ],
    "RescaleSlope": ["0", "nan", "inf", "1e308", "-1e-320"],
    "RescaleIntercept": ["nan", "-inf", "1e308"],
    "WindowWidth": ["0", "-5", "nan", "inf", "1e-300"],
}
NEEDED = [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation",
    "PhotometricInterpretation", "PixelData",
]  # fmt: skip


def dicom_seed(rng: np.random.Generator) -> tuple[Seed, Dataset]:
    """An intact DICOM file, now and then a real one."""
    path = data_root() / "dicom" / "siim_cxr_jpeg.dcm"
    if rng.random() < 0.04 and path.is_file():
        return Seed(path.name, path.read_bytes(), real(path)), dcmread(path)
    seed = pick(rng, ".dcm")
    return seed, dcmread(BytesIO(seed.content))


@cache
def real(path: Path) -> Pixels:
    return read_image(path, 3).numpy()


def dicom_absurd(rng: np.random.Generator) -> Case:
    """One element with an absurd value; NaN and sizes that do not fit must be refused."""
    seed, file = dicom_seed(rng)
    name = list(ABSURD)[rng.integers(len(ABSURD))]
    value = ABSURD[name][rng.integers(len(ABSURD[name]))]
    if name.startswith("Window"):
        file.WindowCenter = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.add_new(
            name,
            {"Photo": "CS", "Resca": "DS", "Windo": "DS", "Numbe": "IS"}.get(name[:5], "US"),
            value,
        )
    unused = file.get("SamplesPerPixel") != 1  # colour is not rescaled
    sure = name in {"Rows", "Columns", "NumberOfFrames", "BitsAllocated"} or (
        value in {"nan", "inf", "-inf"} and not unused
    )
    return Case(seed.name, edited(file), None, "refused" if sure else "either")


def edited(file: Dataset) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(file)


def dicom_missing(rng: np.random.Generator) -> Case:
    """Without an element that is needed, or without one that is not."""
    seed, file = dicom_seed(rng)
    if rng.random() < 0.5:
        name = NEEDED[rng.integers(len(NEEDED))]
        del file[name]
        return Case(
            seed.name, edited(file), None, "either" if name == "PixelRepresentation" else "refused"
        )
    for name in ("PatientName", "PatientID", "StudyDate", "Modality", "InstanceNumber", "HighBit"):
        if name in file and rng.random() < 0.5:
            del file[name]
    return Case(seed.name, edited(file), seed.pixels, "either" if "HighBit" not in file else "read")


def dicom_private(rng: np.random.Generator) -> Case:
    """Private elements, one of them large, and nested sequences."""
    seed, file = dicom_seed(rng)
    block = file.private_block(0x0099, "A scanner's own", create=True)
    block.add_new(1, "UN", rng.bytes(int(rng.integers(1, 2000))))
    block.add_new(2, "LO", "Doe^Jane")
    inner = Dataset()
    for _ in range(int(rng.integers(1, 60))):
        outer = Dataset()
        outer.RequestAttributesSequence = [inner]
        inner = outer
    file.RequestAttributesSequence = [inner]
    return Case(seed.name, edited(file), seed.pixels, "read")


def dicom_window(rng: np.random.Generator) -> Case:
    """MONOCHROME1, and a window over all values: the picture turned, or as it is."""
    word = grey(16)
    file = dicom(word)
    pixels = planes(word, 65535)
    if rng.random() < 0.5:
        file.PhotometricInterpretation, pixels = "MONOCHROME1", 1 - pixels
    if rng.random() < 0.5:
        file.WindowCenter, file.WindowWidth = "32768", "65536"
    return Case("x.dcm", written(file), pixels, "read")


def dicom_frames(rng: np.random.Generator) -> Case:
    """Several frames, or as many as it says are not there."""
    byte = grey().astype(np.uint8)
    file = dicom(byte)
    file.NumberOfFrames = int(rng.integers(2, 9))
    file.PixelData = byte.tobytes() * (file.NumberOfFrames if rng.random() < 0.5 else 1)
    return Case("x.dcm", edited(file), None, "refused")


def dicom_float(rng: np.random.Generator) -> Case:
    """Float pixels, with NaN or without."""
    values = grey().astype(np.float32) / 255
    values[1, 2] = [np.nan, 0.5][rng.integers(2)]
    file = dicom(grey().astype(np.uint8))
    del file.PixelData
    file.BitsAllocated = 32
    file.FloatPixelData = values.tobytes()
    return Case("x.dcm", edited(file), None, "refused")


def dicom_bomb(rng: np.random.Generator) -> Case:
    """A deflated file of 700 MiB, or a stream that is far larger than its header says."""
    byte = grey().astype(np.uint8)
    if rng.random() < 0.5:
        whole = written(dicom(byte, DeflatedExplicitVRLittleEndian))
        at = whole.index(b"1.2.840.10008.1.2.1.99") + 22
        return Case("x.dcm", whole[:at] + zeros(700, -15), None, "refused")
    side = 30000
    if rng.random() < 0.5:
        stream = bytearray(saved(Image.fromarray(byte), "JPEG2000", no_jp2=True))
        stream[8:16] = struct.pack(">II", side, side)
        stream[24:32] = struct.pack(">II", side, side)
        syntax = JPEG2000Lossless
    else:
        stream = bytearray(saved(Image.fromarray(byte), "JPEG"))
        at = stream.index(b"\xff\xc0")
        stream[at + 5 : at + 9] = struct.pack(">HH", side, side)
        syntax = JPEGBaseline8Bit
    return Case("x.dcm", edited(compressed(byte, syntax, bytes(stream))), None, "refused")


def dicom_stream(rng: np.random.Generator) -> Case:
    """Damaged headers of a compressed frame, at which GDCM ends the process."""
    byte = grey().astype(np.uint8)
    if rng.random() < 0.5:
        stream = bytearray(saved(Image.fromarray(byte), "JPEG2000", no_jp2=True))
        stream[42] = int(rng.integers(32, 128))  # bits
        file = compressed(byte, JPEG2000Lossless, bytes(stream))
        return Case("x.dcm", edited(file), None, "refused")
    stream = bytearray(saved(Image.fromarray(byte), "JPEG"))
    if rng.random() < 0.5:
        stream[stream.index(b"\xff\xc0") + 4] = int(rng.integers(17, 256))  # bits
    else:
        stream[stream.index(b"\xff\xc4")] = int(rng.integers(255))  # no marker of a table any more
    file = compressed(byte, JPEGBaseline8Bit, bytes(stream))
    return Case("x.dcm", edited(file), None, "refused")


def dicom_syntax(rng: np.random.Generator) -> Case:
    """Another transfer syntax than that of the pixels."""
    seed, file = dicom_seed(rng)
    names = ["1", "2", "4.50", "4.70", "4.80", "4.90", "4.201", "5", "99.1"]
    others = [f"1.2.840.10008.1.2.{name}" for name in names]
    old, new = str(file.file_meta.TransferSyntaxUID), others[rng.integers(len(others))]
    even = [text.encode() + b"\0" * (len(text) % 2) for text in (old, new)]
    head = [struct.pack("<H", len(text)) + text for text in even]
    return Case(
        seed.name, seed.content.replace(*head, 1), seed.pixels if old == new else None, "either"
    )


KINDS: list[Mutate] = [
    *[intact, cut, cut, cut, empty, flipped, flipped, flipped, blanked, blanked, foreign, text],
    *[trailing, png_header, png_bomb, png_picture_bomb, tiff_tag, tiff_tag, tiff_float, tiff_ring],
    *[jpeg_size, dicom_absurd, dicom_absurd, dicom_absurd, dicom_missing, dicom_private],
    *[dicom_window, dicom_frames, dicom_float, dicom_bomb, dicom_syntax, dicom_stream, png_stored],
]


def cases(count: int) -> Iterator[tuple[str, Case]]:
    for index in range(count):
        mutate = KINDS[index % len(KINDS)]
        yield mutate.__name__, mutate(np.random.default_rng([7, index]))


# --- reading in another process ---------------------------------------------------------------


def read_each(paths: Sequence[Path], pipe: Connection) -> None:
    """Send what each file gives: pixels or a sentence, and by how many MiB memory grew."""
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    warnings.simplefilter("ignore")
    for path in paths:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        try:
            given: Pixels | str = read_image(path, 3).numpy()
        except ValueError as error:
            given = str(error)
        except BaseException as error:
            given = f"!{error!r}"
        pipe.send((given, (resident("VmHWM") - before) // 1024))


def resident(name: str) -> int:
    """KiB of this process's memory now (VmRSS), or at most since it was reset (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def given_by(paths: Sequence[Path]) -> Iterator[tuple[Pixels | str, int]]:
    """What each file gives; a file that ends or holds up its process is told, and left behind."""
    done = 0
    while done < len(paths):
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(
            target=read_each, args=(paths[done:], theirs), daemon=True
        )
        child.start()
        theirs.close()
        try:
            while done < len(paths):
                ended = ours.poll(SECONDS)
                yield ours.recv() if ended else ("!no end", 0)
                done += 1
                if not ended:
                    break
        except EOFError:
            child.join()
            yield f"!ended by {child.exitcode}", 0
            done += 1
        child.kill()
        child.join()


def fault(case: Case, path: Path, given: Pixels | str, mebibytes: int) -> str:
    """What is wrong with what a file gave; nothing if all is well."""
    if mebibytes > MEBIBYTES:
        return f"memory grew by {mebibytes} MiB"
    if isinstance(given, str):
        if not re.fullmatch(rf"Image {re.escape(str(path))} cannot be read: [^\n]+[^.]\.", given):
            return f"not one sentence: {given[:300]!r}"
        return f"refused: {given}" if case.outcome == "read" else ""
    if case.outcome == "refused":
        return f"read, with shape {given.shape}"
    if not (given.dtype == np.float32 and len(given) == 3 and 0 <= given.min() <= given.max() <= 1):
        return f"no image: {given.dtype}, {given.shape}, {given.min()} to {given.max()}"
    if case.pixels is None:
        return ""
    if given.shape != case.pixels.shape or np.abs(given - case.pixels).max() > 1e-5:
        return f"other pixels, shape {given.shape}"
    return ""


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_images(
    count: int, tmp_path: Path, tell_fault: Callable[[str, int, int], None]
) -> None:
    kinds, mutated = zip(*cases(count), strict=True)
    paths = [tmp_path / f"{index}_{case.name}" for index, case in enumerate(mutated)]
    for path, case in zip(paths, mutated, strict=True):
        path.write_bytes(case.content)
    answers = zip(kinds, mutated, paths, given_by(paths), strict=True)
    found = [(kind, path.name, fault(case, path, *answer)) for kind, case, path, answer in answers]
    lost = [line for line in found if line[2]]
    tell_fault("images: mutated files", count, count - len(lost))
    assert lost == []
