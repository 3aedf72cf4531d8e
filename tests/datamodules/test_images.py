"""Decoding against independent decoders and values by hand; masks and boxes on the target grid."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, FileDataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit
from torch.testing import assert_close

from datamodules.base import data_root
from datamodules.images import boxes_to_mask, read_image, read_mask, resize_image, resize_mask

GREY8 = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
GREY16 = (np.arange(12, dtype=np.uint16) * 5461 + 77).reshape(3, 4)
RGB8 = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def dicom(path: Path, pixels: NDArray[np.generic], **attributes: object) -> Path:
    """Write a small DICOM file; ``attributes`` replace or add elements."""
    bits = pixels.dtype.itemsize * 8
    dataset = FileDataset(path, {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def real(name: str) -> Path:
    path = data_root() / "dicom" / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


@pytest.mark.parametrize(
    ("pixels", "name"),
    [(GREY8, "a.png"), (GREY8, "a.tif"), (GREY16, "a.png"), (GREY16, "a.tif"), (RGB8, "a.png")],
)
def test_files_match_scikit_image(
    tmp_path: Path, pixels: NDArray[np.uint8 | np.uint16], name: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    expected = skimage.io.imread(tmp_path / name) / np.iinfo(pixels.dtype).max
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, -1)
    read = read_image(tmp_path / name, 3).permute(1, 2, 0)
    assert_close(read, torch.from_numpy(expected).float(), atol=1e-6, rtol=0)


def test_one_bit_palette_alpha_and_cmyk_by_hand(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert read_image(tmp_path / "one.png", 1).tolist() == [[[1.0, 0.0]]]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 51])
    palette.save(tmp_path / "palette.png")
    assert_close(read_image(tmp_path / "palette.png", 3).flatten(), torch.tensor([1.0, 0, 0.2]))
    Image.new("RGBA", (1, 1), (51, 102, 153, 0)).save(tmp_path / "alpha.png")
    assert_close(read_image(tmp_path / "alpha.png", 3).flatten(), torch.tensor([0.2, 0.4, 0.6]))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert_close(read_image(tmp_path / "cmyk.tif", 3)[:, 0, 0], torch.tensor([1.0, 0, 0]))


def test_colour_to_grey_by_hand(tmp_path: Path) -> None:  # ITU-R 601: 0.299, 0.587, 0.114
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "a.png")
    assert_close(read_image(tmp_path / "a.png", 1), torch.tensor([[[0.299 + 0.2 * 0.114]]]))
    Image.new("RGB", (1, 1), (255, 255, 255)).save(tmp_path / "white.png")
    assert_close(read_image(tmp_path / "white.png", 1), torch.ones(1, 1, 1), atol=1e-6, rtol=0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(GREY8).save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(np.rot90(GREY8, -1).copy()).float() / 255
    assert_close(read_image(tmp_path / "a.png", 1)[0], expected)


def test_tiff_that_counts_from_white_is_inverted(tmp_path: Path) -> None:
    Image.fromarray(GREY16).save(tmp_path / "a.tif", tiffinfo={262: 0})
    expected = 1 - torch.from_numpy(GREY16.astype(np.float32)) / 65535
    assert_close(read_image(tmp_path / "a.tif", 1)[0], expected)


def test_frames_of_a_tiff_are_chosen(tmp_path: Path) -> None:
    first, second = Image.fromarray(GREY8), Image.fromarray(GREY8[::-1].copy())
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert_close(
        read_image(tmp_path / "a.tif", 1, frame=1),
        read_image(tmp_path / "a.tif", 1, frame=0).flip(1),
    )
    with pytest.raises(ValueError, match=r"has 2 frames, give the one to read \(0 to 1\)"):
        read_image(tmp_path / "a.tif", 1)
    with pytest.raises(ValueError, match="frame must be in 0 to 1, but got 2"):
        read_image(tmp_path / "a.tif", 1, frame=2)


def test_unreadable_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    Image.fromarray(RGB8).resize((64, 64)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.dcm").write_text("no image")
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    Image.new("L", (2, 2)).save(tmp_path / "a.gif")
    for name in ("cut.png", "text.png", "text.dcm", "float.tif", "a.gif", "missing.png"):
        sentence = f"Image {re.escape(str(tmp_path / name))} cannot be read: [^\n]+[^.]\\.$"
        with pytest.raises(ValueError, match=sentence):
            read_image(tmp_path / name, 1)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.png")
    file = dicom(tmp_path / "a.dcm", GREY8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)
    assert read_image(tmp_path / "a.png", 1).shape == read_image(file, 1).shape == (1, 3, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    for path in (tmp_path / "a.png", file):
        with pytest.raises(ValueError, match="12 pixels"):
            read_image(path, 1)


def test_dicom_range_is_that_of_the_stored_bits(tmp_path: Path) -> None:
    pixels = np.array([[0, 1023, 4095]], np.uint16)
    expected = torch.tensor([[[0, 1023 / 4095, 1]]])
    file = dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11)
    assert_close(read_image(file, 1), expected)
    signed = np.array([[-128, 0, 127]], np.int8)
    assert_close(read_image(dicom(file, signed), 1), torch.tensor([[[0, 128 / 255, 1]]]))
    inverted = dicom(
        file, pixels, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1"
    )
    assert_close(read_image(inverted, 1), 1 - expected)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_dicom_window_by_hand(tmp_path: Path, bits: int) -> None:
    # Rescaled: -1000, -500, 0, 24, 1000. The window [-500, 500] of PS3.3 C.11.2.1.2.1.
    pixels = np.array([[0, 500, 1000, 1024, 2000]], np.uint16) >> (0 if bits > 8 else 4)
    stored = pixels.astype(np.uint8 if bits == 8 else np.uint16)
    slope = 16 if bits == 8 else 1
    window = {"WindowCenter": [0, 9], "WindowWidth": [1001, 9]}
    rescale = {"RescaleSlope": slope, "RescaleIntercept": -1000}
    depth = {"BitsStored": bits, "HighBit": bits - 1}
    read = read_image(dicom(tmp_path / "a.dcm", stored, **window, **rescale, **depth), 1)
    rescaled = stored.astype(np.float32) * slope - 1000
    expected = ((rescaled + 0.5) / 1000 + 0.5).clip(0, 1)
    assert_close(read.flatten(), torch.from_numpy(expected.ravel()), atol=1e-5, rtol=0)


def test_dicom_negative_slope_turns_dark_into_bright(tmp_path: Path) -> None:
    rescale = {"RescaleSlope": -1, "RescaleIntercept": 255}
    plain = read_image(dicom(tmp_path / "a.dcm", GREY8, **rescale), 1)
    window = {"WindowCenter": 128, "WindowWidth": 256}
    windowed = read_image(dicom(tmp_path / "b.dcm", GREY8, **rescale, **window), 1)
    assert_close(plain[0], 1 - torch.from_numpy(GREY8.astype(np.float32)) / 255)
    assert_close(windowed, plain, atol=1e-5, rtol=0)


def test_dicom_lookup_tables_by_hand(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], [0, 65535, 13107, 26214]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    pixels, expected = np.array([[0, 1, 2, 3]], np.uint8), torch.tensor([0, 1, 0.2, 0.4])
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        file = dicom(tmp_path / "a.dcm", pixels, **{name: [table]})
        assert_close(read_image(file, 1).flatten(), expected)


def test_dicom_frames_are_refused_unless_chosen(tmp_path: Path) -> None:
    frames = np.stack([GREY8, GREY8[::-1]])
    file = dicom(tmp_path / "a.dcm", frames, NumberOfFrames=2)
    with pytest.raises(ValueError, match=r"has 2 frames, give the one to read \(0 to 1\)"):
        read_image(file, 1)
    assert_close(read_image(file, 1, frame=1)[0], torch.from_numpy(frames[1].copy()) / 255)


def test_dicom_colour(tmp_path: Path) -> None:
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Rows": 3, "Columns": 4}
    expected = torch.from_numpy(RGB8).permute(2, 0, 1) / 255
    file = dicom(tmp_path / "a.dcm", RGB8, PhotometricInterpretation="RGB", **colour)
    assert_close(read_image(file, 3), expected)
    ybr = np.asarray(Image.fromarray(RGB8).convert("YCbCr"))
    file = dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL", **colour)
    assert_close(read_image(file, 3), expected, atol=3 / 255, rtol=0)


def test_dicom_compressed_by_pillow(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    for syntax, kind in ((JPEGBaseline8Bit, "JPEG"), (JPEG2000Lossless, "JPEG2000")):
        buffer = BytesIO()
        Image.fromarray(smooth).save(buffer, kind, **({"no_jp2": True} if kind != "JPEG" else {}))
        dataset = dcmread(dicom(tmp_path / "a.dcm", smooth))
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].VR, dataset.file_meta.TransferSyntaxUID = "OB", syntax
        dataset.save_as(tmp_path / "a.dcm")
        expected = np.asarray(Image.open(buffer))
        assert_close(read_image(tmp_path / "a.dcm", 1)[0], torch.from_numpy(expected.copy()) / 255)


def test_real_jpeg_dicom_matches_pillow() -> None:
    path = real("siim_cxr_jpeg.dcm")
    frame = next(generate_frames(dcmread(path).PixelData, number_of_frames=1))
    expected = np.asarray(Image.open(BytesIO(frame)), np.float32) / 255
    assert_close(read_image(path, 1)[0], torch.from_numpy(expected))


def test_real_15_bit_monochrome1_is_shown_with_bright_bone() -> None:
    image = read_image(real("RG1_J2KI.dcm"), 1)
    assert image.shape == (1, 1955, 1841)
    assert image.min() >= 0
    assert 0.9 < image.max() <= 1
    thumb = resize_image(image, 64)[0]
    spine, lung = thumb[20:40, 31:34].mean(), thumb[20:30, 16:22].mean()
    assert spine > lung + 0.1
    stored = dcmread(real("RG1_J2KI.dcm")).pixel_array.astype(np.float32)
    shown = 1 - ((stored - 14999.5) / 29999 + 0.5).clip(0, 1)
    assert_close(image[0], torch.from_numpy(shown), atol=1e-5, rtol=0)


def test_read_mask_is_any_channel_not_zero(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1, 2] = 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[False, True], [False, False]]


def test_resize_image_keeps_constants_and_range() -> None:
    noise = (torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    small = resize_image(noise, 16)
    assert small.shape == (3, 16, 16)
    assert 0 <= small.min() <= small.max() <= 1
    stripes = torch.tensor([1.0, 0, 0, 0]).repeat(1, 64, 16)
    inner = resize_image(stripes, 16)[:, :, 2:-2]
    assert_close(inner, torch.full_like(inner, 0.25), atol=0.1, rtol=0)  # antialiased
    assert_close(resize_image(torch.full((1, 37, 53), 0.3), 16), torch.full((1, 16, 16), 0.3))


def test_resize_mask_by_hand() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert resize_mask(mask, 2).tolist() == [[False, True], [True, False]]


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.integers(3, 60), st.integers(1, 40), st.data())
def test_one_pixel_never_vanishes(height: int, width: int, size: int, data: st.DataObject) -> None:
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(height, width, dtype=torch.bool)
    assert not resize_mask(mask, size).any()
    mask[y, x] = True
    small = resize_mask(mask, size)
    drawn = boxes_to_mask([(x, y, x + 1, y + 1)], height, width, size)
    assert small.any()
    assert drawn.any()
    rows, columns = small.nonzero().unbind(1)
    assert ((rows + 0.5) * height / size - (y + 0.5)).abs().max() <= 0.5 + height / size
    assert ((columns + 0.5) * width / size - (x + 0.5)).abs().max() <= 0.5 + width / size


def test_boxes_by_hand() -> None:
    # 8 x 4 pixels onto 4 x 4: centres lie at x = 1, 3, 5, 7 and y = 0.5, 1.5, 2.5, 3.5.
    mask = boxes_to_mask([(1, 0.5, 5, 2.5), (7.2, 3.9, 7.9, 4)], height=4, width=8, size=4)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert mask.int().tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 19)] * 4), st.integers(20, 40))
def test_boxes_at_their_own_size_are_slices(corners: tuple[int, int, int, int], size: int) -> None:
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    expected = torch.zeros(size, size, dtype=torch.bool)
    expected[y0 : y1 + 1, x0 : x1 + 1] = True
    assert torch.equal(boxes_to_mask([(x0, y0, x1 + 1, y1 + 1)], size, size, size), expected)
