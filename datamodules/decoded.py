"""Large sets of grey images: decoded once into a memory map; their tables."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8, UInt16
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import (
    Augmentation,
    ImageDataModule,
    Loading,
    Record,
    Sample,
    data_root,
)
from datamodules.images import BadImage, Box, boxes_to_mask, read_image, resize_image

Integers = UInt8[Tensor, "c h w"] | UInt16[Tensor, "c h w"]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Policy = Literal["error", "skip"]
DECODING = 3  # to be raised with every change of what a decoded image looks like


class Decoded(ImageDataModule):
    """Grey images that are decoded once.

    ``prepare_data`` decodes every image at ``loading.size``, with ``loading.workers`` processes; it
    takes up where it was stopped. A subclass names the files.

    Args:
        folder: Of the download, relative to the data root.
        cache: Folder of the decoded images, relative to the data root; None is ``cache`` in
            ``folder``.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of a drawn split.
        fold: Test fold of a cross-validation, instead of the split.
        folds: Number of folds.
    """

    def __init__(
        self,
        folder: str,
        cache: str | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder = data_root() / folder
        self.cache = data_root() / cache if cache else self.folder / "cache"

    @abstractmethod
    def paths(self) -> dict[str, Path]:
        """File of every image by its id, whether it is there or not."""

    @cached_property
    def places(self) -> dict[str, int]:
        """Place of every image in the cache."""
        return {name: place for place, name in enumerate(self.paths())}

    @cached_property
    def cache_file(self) -> Path:
        """Decoded images of these ids at this size; other settings have another name."""
        settings = json.dumps([DECODING, self.loading.bits, list(self.places)])
        checksum = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return self.cache / f"{self.loading.size}px-{checksum}.npy"

    def prepare_data(self) -> None:
        """Decode what the cache does not hold yet, behind a progress bar."""
        loading = self.loading
        if finished(self.cache_file, loading.on_bad_image):
            return
        paths = self.paths()
        gone = [path for path in paths.values() if not path.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(paths)} images are missing, the first is {gone[0]}; "
                "unpack the download there."
            )
        decode_all(
            paths,
            loading.size,
            loading.workers,
            self.cache_file,
            loading.bits,
            loading.on_bad_image,
        )
        open_cache.cache_clear()

    def bad_images(self, records: Sequence[Record]) -> dict[str, str]:
        """Those that could not be decoded."""
        bad = unreadable(self.cache_file)
        return {record.id: bad[record.id] for record in records if record.id in bad}

    def decoded(self, name: str) -> tuple[Integers, tuple[int, int]]:
        """A decoded image, and height and width of its file.

        Raises:
            ValueError: If there is no cache, or the image is not as it was when it was decoded.
            BadImage: If it could not be decoded.
        """
        cache, place = open_cache(self.cache_file), self.places[name]
        pixels = np.array(cache.images[place])
        height, width, checksum = cache.facts[place].tolist()
        if height == 0:
            raise BadImage(unreadable(self.cache_file)[name])
        if not cache.checked[place] and zlib.crc32(pixels.data) != checksum:
            raise ValueError(
                f"Cache {self.cache_file} is damaged: image {name!r} has another checksum than "
                "when it was decoded; remove the file, it will be made anew."
            )
        cache.checked[place] = True
        image = torch.from_numpy(pixels)[None].expand(self.loading.channels, -1, -1)
        return image, (height, width)

    def boxed(self, name: str, boxes: Mapping[str, Sequence[Box]]) -> Sample:
        """A decoded image, a mask of each finding's boxes, and their union; None without any.

        Args:
            name: Of the image.
            boxes: By finding, in pixels of the file.
        """
        image, (height, width) = self.decoded(name)
        features = {
            finding: boxes_to_mask(each, height, width, self.loading.size)
            for finding, each in boxes.items()
        }
        union = torch.stack([*features.values()]).any(0) if features else None
        return Sample(image, union, features)


def decode_all(
    paths: Mapping[str, Path],
    size: int,
    workers: int,
    target: Path,
    bits: Literal[8, 16] = 8,
    on_bad_image: Policy = "error",
) -> None:
    """Decode images into one grey memory map (n, size, size), in the order of ``paths``.

    It grows under another name until it is complete; a second call takes up what is missing. Beside
    it lie ``<name>.facts.npy``, Int64 (n, 3), height and width of every file (0 until it is
    decoded) and the CRC-32 of its pixels, and ``<name>.json``, which lists the ids and why files
    could not be read. One process at a time decodes, a second one waits.

    Args:
        paths: File of each id.
        size: Side of the decoded images, pixels.
        workers: Processes; 0 decodes in this one.
        target: File to be written, ending in .npy.
        bits: Of the values: multiples of 1/255 as UInt8, or of 1/65535 as UInt16.
        on_bad_image: See `Loading`; "error" also tries again what was skipped before.

    Raises:
        BadImage: If an image is missing or cannot be read; what was decoded before is kept.
        OSError: If the disk is full or cannot be written; what was decoded before is kept.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target):
            if not finished(target, on_bad_image):
                files = GreyFiles(list(paths.values()), size, bits, on_bad_image)
                bad = fill(files, workers, target)
                reasons = {name: bad[place] for place, name in enumerate(paths) if place in bad}
                about = {"ids": list(paths), "size": size, "decoding": DECODING}
                content = json.dumps(about | {"unreadable": reasons}).encode()
                _replace(facts_about(target), lambda file: file.write(content))
                os.replace(growing_file(target), target)
    except OSError as error:
        raise OSError(
            f"Cache {target} cannot be written ({error.strerror or error}): make room for "
            f"{len(paths) * size**2 * bits // 8 / 2**20:.0f} MiB or name another folder with "
            "cache, and start again; what was decoded is kept."
        ) from error


def fill(files: GreyFiles, workers: int, target: Path) -> dict[int, str]:
    """Decode the files that the growing cache lacks; why some could not be read, by place."""
    growing, facts = growing_file(target), facts_file(target)
    if target.exists():  # with images that could not be read, which are tried again
        os.replace(target, growing)
    if not (facts.exists() and growing.exists()):
        _replace(growing, files.allocate)
        _replace(facts, lambda file: np.save(file, np.zeros((len(files), 3), np.int64)))
    pixels, known = np.load(growing, mmap_mode="r"), np.load(facts, mmap_mode="r")
    # A process that was killed may have left a line without its pixels, or half of either.
    left = [k for k in range(len(files)) if not known[k, 0] or crc(pixels[k]) != known[k, 2]]
    # A loader's workers do what is needed: one thread each, results in order.
    loader = DataLoader(files, None, sampler=left, num_workers=workers)
    bad: dict[int, str] = {}
    # Written, not mapped: on a full disk a write is an error, a mapped page ends the process.
    with growing.open("r+b", buffering=0) as images, facts.open("r+b", buffering=0) as lines:
        for place, decoded in zip(left, track(loader, "Decoding", len(left)), strict=True):
            if isinstance(decoded, str):
                bad[place] = decoded
                continue
            image, shape = np.asarray(decoded[0]), decoded[1]
            line = np.array([*shape, crc(image)], np.int64)
            _write_at(images, pixels.offset + place * image.nbytes, image.tobytes())
            _write_at(lines, known.offset + place * line.nbytes, line.tobytes())
        os.fsync(images)
        os.fsync(lines)
    return bad


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Wait until no other process decodes into this cache; the lock ends with its process."""
    lock = target.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"Another process decodes {target}: waiting for it.", stacklevel=2)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)  # only if all went well: who waits then finds the cache


def finished(target: Path, on_bad_image: Policy) -> bool:
    """Whether nothing is left to be decoded; "error" does not put up with what was skipped."""
    return target.exists() and (on_bad_image == "skip" or not unreadable(target))


def unreadable(target: Path) -> dict[str, str]:
    """Why images of a cache could not be decoded, by id."""
    reasons: dict[str, str] = json.loads(facts_about(target).read_text()).get("unreadable", {})
    return reasons


def crc(pixels: Pixels) -> int:
    """Checksum of an image."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def growing_file(target: Path) -> Path:
    """Where `decode_all` keeps the images until all are there."""
    return target.with_suffix(".growing.npy")


def facts_file(target: Path) -> Path:
    """Where `decode_all` keeps the sizes of the files and the checksums."""
    return target.with_suffix(".facts.npy")


def facts_about(target: Path) -> Path:
    """Where `decode_all` lists the ids."""
    return target.with_suffix(".json")


class Cache(NamedTuple):
    """What `decode_all` wrote, and which images have been checked by this process."""

    images: Pixels
    facts: NDArray[np.int64]
    checked: NDArray[np.bool_]


@lru_cache(maxsize=8)
def open_cache(path: Path) -> Cache:
    """The cache at a path; kept here, as a data module would copy it to each worker.

    Raises:
        ValueError: If there is none.
    """
    if not path.exists():
        raise ValueError(f"Cache {path} is missing; call prepare_data first.")
    images = open_memmap(path, "r")
    return Cache(images, np.load(facts_file(path)), np.zeros(len(images), np.bool_))


class GreyFiles(Dataset[tuple[Pixels, tuple[int, int]] | str]):
    """Images in grey (size, size), and their files' height and width, decoded when asked.

    With "skip" a file that cannot be read gives the sentence that says why.
    """

    def __init__(
        self, paths: list[Path], size: int, bits: Literal[8, 16], on_bad_image: Policy
    ) -> None:
        self.paths, self.size, self.on_bad_image = paths, size, on_bad_image
        self.largest, self.kind = 2**bits - 1, np.dtype(np.uint8 if bits == 8 else np.uint16)

    def __len__(self) -> int:
        """Files in all."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Pixels, tuple[int, int]] | str:
        """Decode one file."""
        try:
            image = read_image(self.paths[index], 1)
        except BadImage as error:
            if self.on_bad_image == "error":
                raise
            return str(error)
        resized = resize_image(image, self.size)
        height, width = image.shape[1:]
        return (resized[0] * self.largest).round().numpy().astype(self.kind), (height, width)

    def allocate(self, file: BinaryIO) -> None:
        """Write an .npy of zeros for all images, with its room on the disk."""
        shape = (len(self), self.size, self.size)
        about = {"descr": dtype_to_descr(self.kind), "fortran_order": False, "shape": shape}
        write_array_header_1_0(file, about)
        file.flush()
        os.posix_fallocate(file.fileno(), file.tell(), math.prod(shape) * self.kind.itemsize)


def _write_at(file: FileIO, place: int, content: bytes) -> None:
    """Write all of it; a disk that fills up takes a part, and then is an error."""
    while content:
        written = os.pwrite(file.fileno(), content, place)
        place, content = place + written, content[written:]


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name first, so that it is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file)
    except OSError:
        temporary.unlink()
        raise
    os.replace(temporary, path)


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame | None:
    """Table at ``path``, or at the same name with .gz; None where neither exists."""
    found = [name for name in (path, path.with_name(f"{path.name}.gz")) if name.is_file()]
    if not found:
        return None
    table = pd.read_csv(found[0])
    for column in columns:
        if column not in table:
            names = ", ".join(map(str, table))
            raise ValueError(f"Table {found[0]}: column {column!r} is missing; it has {names}.")
    return table


def needed_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """As `read_csv`, but the table must be there."""
    table = read_csv(path, columns)
    if table is None:
        raise ValueError(f"Table {path} (or .gz) is missing; unpack the download there.")
    return table
