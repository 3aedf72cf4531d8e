"""RSNA Pneumonia Detection Challenge 2018: chest X-rays, healthy against opacity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pandas as pd
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from datamodules.base import Augmentation, ImageDataModule, Loading, Record, Sample, data_root
from datamodules.images import Box, boxes_to_mask, read_image, resize_image

SIDE = 1024  # pixels of every image of the challenge; its boxes are given in them
CLASSES = ("Normal", "Lung Opacity")  # "No Lung Opacity / Not Normal" is left out
DECODING = 1  # to be raised with every change of what a decoded image looks like


class RSNAPneumonia(ImageDataModule):
    """14,863 frontal chest X-rays: 8,851 healthy, 6,012 with boxes around opacities.

    The folder holds the challenge's files as downloaded: ``stage_2_train_images/*.dcm``,
    ``stage_2_train_labels.csv`` and ``stage_2_detailed_class_info.csv``. ``prepare_data`` decodes
    every image once, in grey and at ``loading.size``, with ``loading.workers`` processes; it takes
    up where it was stopped.

    Args:
        folder: Of the download, relative to the data root.
        split: The one of arXiv:2012.07332's authors, or drawn from the seed.
        cache: Folder of the decoded images, relative to the data root; None is ``cache`` in
            ``folder``.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of a drawn split.
        fold: Test fold of a cross-validation, instead of either split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing or cannot be read, or an exam has no place in the split.

    Source: Shih et al., Radiology: Artificial Intelligence 1:e180041, 2019.
    """

    class_names = ("healthy", "opacity")

    def __init__(
        self,
        folder: str = "rsna",
        split: Literal["authors", "seeded"] = "authors",
        cache: str | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder, self.split = data_root() / folder, split
        self.cache = data_root() / cache if cache else self.folder / "cache"

    @cached_property
    def table(self) -> pd.DataFrame:
        """The exams, see ``read_tables``, by id."""
        return read_tables(self.folder).set_index("id")

    @cached_property
    def cache_file(self) -> Path:
        """Decoded images of these exams at this size; other settings have another name."""
        settings = json.dumps([DECODING, self.table.index.tolist()])
        checksum = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return self.cache / f"{self.loading.size}px-{checksum}.npy"

    def records(self) -> list[Record]:
        """Every exam that is healthy or has an opacity, in the order of the label table."""
        table = self.table
        if self.split == "authors" and not table["split"].all():
            raise ValueError(
                f"Exam {table.index[table['split'] == ''][0]} is not in the authors' split; set "
                f"split to 'seeded', or put their authors_split.json into {self.folder}."
            )
        splits = table["split"] if self.split == "authors" else [""] * len(table)
        return [Record(*row) for row in zip(table.index, table["label"], splits, strict=True)]

    def prepare_data(self) -> None:
        """Decode what the cache does not hold yet, behind a progress bar."""
        if not self.cache_file.exists():
            images = self.folder / "stage_2_train_images"
            paths = {exam: images / f"{exam}.dcm" for exam in self.table.index}
            gone = [path for path in paths.values() if not path.is_file()]
            if gone:
                raise ValueError(
                    f"{len(gone)} of {len(paths)} images are missing, the first is {gone[0]}; "
                    "unpack the challenge's download there."
                )
            decode_all(paths, self.loading.size, self.loading.workers, self.cache_file)

    def read(self, record: Record) -> Sample:
        """Decoded image and boxes of one exam; None for a healthy one."""
        if not self.cache_file.exists():
            raise ValueError(f"Cache {self.cache_file} is missing; call prepare_data first.")
        place = self.table.index.get_loc(record.id)
        pixels = np.array(open_cache(self.cache_file)[place])
        image = torch.from_numpy(pixels)[None].float() / 255
        boxes = self.table["boxes"].iloc[place]
        mask = boxes_to_mask(boxes, SIDE, SIDE, self.loading.size) if boxes else None
        return Sample(image.expand(self.loading.channels, -1, -1), mask)


def read_tables(folder: Path) -> pd.DataFrame:
    """Exams of the challenge that are healthy or have an opacity.

    Args:
        folder: With ``stage_2_train_labels.csv``. ``stage_2_detailed_class_info.csv`` tells the
            healthy from the other negatives; without it the exams of the authors' split are
            taken, which holds exactly these. Both files may end in .gz. ``authors_split.json``
            replaces the split that comes with this package.

    Returns:
        Columns id; label, 1 with opacity; split, "" for an exam that is not in the authors'; boxes,
        a list of (x0, y0, x1, y1) in pixels of the original image.

    Raises:
        ValueError: If the label table is missing or lacks a column.
    """
    names = ["patientId", "x", "y", "width", "height", "Target"]
    labels = _read_csv(folder / "stage_2_train_labels.csv", names)
    if labels is None:
        raise ValueError(f"Table {folder / 'stage_2_train_labels.csv'} (or .gz) is missing.")
    boxes: dict[str, list[Box]] = {}
    for exam, x, y, width, height, target in labels[names].itertuples(index=False):
        found = boxes.setdefault(exam, [])
        if target == 1:
            found.append((x, y, x + width, y + height))
    table = pd.DataFrame({"id": list(boxes), "boxes": list(boxes.values())})
    table["label"] = table["boxes"].map(bool).astype(int)
    table["split"] = _authors_split(folder, table["id"])
    classes = _read_csv(folder / "stage_2_detailed_class_info.csv", ["patientId", "class"])
    if classes is None:
        table = table[table["split"] != ""]
    else:
        kept = classes.loc[classes["class"].isin(CLASSES), "patientId"]
        table = table[table["id"].isin(kept)]
    return table[["id", "label", "split", "boxes"]].reset_index(drop=True)


def decode_all(paths: dict[str, Path], size: int, workers: int, target: Path) -> None:
    """Decode images into one grey memory map, UInt8 (n, size, size), in the order of ``paths``.

    It grows under another name, with a flag per image, until it is complete; a second call takes
    up what is missing. A JSON file of the same name lists the ids.

    Args:
        paths: DICOM file of each id.
        size: Side of the decoded images, pixels.
        workers: Processes; 0 decodes in this one.
        target: File to be written, ending in .npy.

    Raises:
        ValueError: If an image is missing or cannot be read; what was decoded before is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    growing, flags = target.with_suffix(".growing.npy"), target.with_suffix(".done.npy")
    shape = (len(paths), size, size)
    if not (flags.exists() and growing.exists()):
        open_memmap(growing, "w+", np.uint8, shape).flush()
        _replace(flags, lambda file: np.save(file, np.zeros(len(paths), np.uint8)))
    pixels, done = open_memmap(growing, "r+"), open_memmap(flags, "r+")
    left = np.flatnonzero(done == 0)
    # A loader's workers do what is needed: one thread each, results in order.
    loader = DataLoader(
        DicomFiles(list(paths.values()), size), None, sampler=left.tolist(), num_workers=workers
    )
    for place, image in zip(left, track(loader, "Decoding", len(left)), strict=True):
        pixels[place] = image
        done[place] = 1
    pixels.flush()
    content = json.dumps({"ids": list(paths), "size": size, "decoding": DECODING})
    _replace(target.with_suffix(".json"), lambda file: file.write(content.encode()))
    os.replace(growing, target)
    flags.unlink()


@lru_cache(maxsize=4)
def open_cache(path: Path) -> NDArray[np.uint8]:
    """Memory map of decoded images; kept here as a data module would copy it to each worker."""
    return open_memmap(path, "r")


class DicomFiles(Dataset[NDArray[np.uint8]]):
    """Images in grey, 8 bit (size, size), decoded when they are asked for."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Decode one file."""
        image = resize_image(read_image(self.paths[index], 1), self.size)
        return (image[0] * 255).round().to(torch.uint8).numpy()


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name first, so that it is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame | None:
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


def _authors_split(folder: Path, exams: Iterable[str]) -> list[str]:
    """Split of each exam, "" where the authors have none."""
    path = folder / "authors_split.json"
    if path.is_file():
        splits: dict[str, list[str]] = json.loads(path.read_text())
        split_of = {exam: name for name, ids in splits.items() for exam in ids}
        return [split_of.get(exam, "") for exam in exams]
    with (files("datamodules") / "split_ids" / "rsna.csv.gz").open("rb") as file:
        shipped = pd.read_csv(file, dtype=str, compression="gzip")
    # Eight of the 36 characters of an id are enough to tell all exams of the challenge apart.
    split_of = dict(zip(shipped["exam"], shipped["split"], strict=True))
    return [split_of.get(exam[:8], "") for exam in exams]
