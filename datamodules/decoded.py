"""Large sets of grey images: decoded once into a memory map; their tables."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Augmentation, ImageDataModule, Loading, Sample, data_root
from datamodules.images import Box, boxes_to_mask, read_image, resize_image

DECODING = 2  # to be raised with every change of what a decoded image looks like


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
        settings = json.dumps([DECODING, list(self.places)])
        checksum = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return self.cache / f"{self.loading.size}px-{checksum}.npy"

    def prepare_data(self) -> None:
        """Decode what the cache does not hold yet, behind a progress bar."""
        if self.cache_file.exists():
            return
        paths = self.paths()
        gone = [path for path in paths.values() if not path.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(paths)} images are missing, the first is {gone[0]}; "
                "unpack the download there."
            )
        decode_all(paths, self.loading.size, self.loading.workers, self.cache_file)

    def decoded(self, name: str) -> tuple[Float[Tensor, "c h w"], tuple[int, int]]:
        """A decoded image, and height and width of its file."""
        if not self.cache_file.exists():
            raise ValueError(f"Cache {self.cache_file} is missing; call prepare_data first.")
        place = self.places[name]
        pixels = torch.from_numpy(np.array(open_cache(self.cache_file)[place]))
        height, width = open_cache(sizes_file(self.cache_file))[place].tolist()
        return (pixels[None].float() / 255).expand(self.loading.channels, -1, -1), (height, width)

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


def decode_all(paths: Mapping[str, Path], size: int, workers: int, target: Path) -> None:
    """Decode images into one grey memory map, UInt8 (n, size, size), in the order of ``paths``.

    It grows under another name until it is complete; a second call takes up what is missing. Beside
    it lie ``<name>.sizes.npy``, Int32 (n, 2), height and width of every file (0 until it is
    decoded), and ``<name>.json``, which lists the ids.

    Args:
        paths: File of each id.
        size: Side of the decoded images, pixels.
        workers: Processes; 0 decodes in this one.
        target: File to be written, ending in .npy.

    Raises:
        ValueError: If an image is missing or cannot be read; what was decoded before is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    growing, sizes = target.with_suffix(".growing.npy"), sizes_file(target)
    if not (sizes.exists() and growing.exists()):
        open_memmap(growing, "w+", np.uint8, (len(paths), size, size)).flush()
        _replace(sizes, lambda file: np.save(file, np.zeros((len(paths), 2), np.int32)))
    pixels, known = open_memmap(growing, "r+"), open_memmap(sizes, "r+")
    left = np.flatnonzero(known[:, 0] == 0)
    # A loader's workers do what is needed: one thread each, results in order.
    loader = DataLoader(
        GreyFiles(list(paths.values()), size), None, sampler=left.tolist(), num_workers=workers
    )
    for place, (image, shape) in zip(left, track(loader, "Decoding", len(left)), strict=True):
        pixels[place] = image
        known[place] = shape
    pixels.flush()
    known.flush()
    content = json.dumps({"ids": list(paths), "size": size, "decoding": DECODING})
    _replace(target.with_suffix(".json"), lambda file: file.write(content.encode()))
    os.replace(growing, target)


def sizes_file(target: Path) -> Path:
    """Where `decode_all` keeps the sizes of the files."""
    return target.with_suffix(".sizes.npy")


@lru_cache(maxsize=8)
def open_cache(path: Path) -> NDArray[np.generic]:
    """Memory map of decoded images; kept here as a data module would copy it to each worker."""
    return open_memmap(path, "r")


class GreyFiles(Dataset[tuple[NDArray[np.uint8], tuple[int, int]]]):
    """Images in grey, 8 bit (size, size), and their files' height and width, decoded when asked."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Decode one file."""
        image = read_image(self.paths[index], 1)
        resized = resize_image(image, self.size)
        height, width = image.shape[1:]
        return (resized[0] * 255).round().to(torch.uint8).numpy(), (height, width)


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name first, so that it is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
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
