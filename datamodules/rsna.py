"""RSNA Pneumonia Detection Challenge 2018: chest X-rays, healthy against opacity."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pandas as pd

from datamodules.base import Augmentation, Loading, Record, Sample
from datamodules.decoded import Decoded, needed_csv, read_csv
from datamodules.images import Box, boxes_to_mask

SIDE = 1024  # pixels of every image of the challenge; its boxes are given in them
CLASSES = ("Normal", "Lung Opacity")  # "No Lung Opacity / Not Normal" is left out


class RSNAPneumonia(Decoded):
    """14,863 frontal chest X-rays: 8,851 healthy, 6,012 with boxes around opacities.

    The folder holds the challenge's files as downloaded: ``stage_2_train_images/*.dcm``,
    ``stage_2_train_labels.csv`` and ``stage_2_detailed_class_info.csv``. Every image is decoded
    once, see `Decoded`.

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
        super().__init__(folder, cache, loading, augmentation, seed, fold, folds)
        self.split = split

    @cached_property
    def table(self) -> pd.DataFrame:
        """The exams, see ``read_tables``, by id."""
        return read_tables(self.folder).set_index("id")

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

    def paths(self) -> dict[str, Path]:
        """DICOM file of every exam."""
        images = self.folder / "stage_2_train_images"
        return {exam: images / f"{exam}.dcm" for exam in self.table.index}

    def read(self, record: Record) -> Sample:
        """Decoded image and boxes of one exam; None for a healthy one."""
        boxes = self.table["boxes"][record.id]
        mask = boxes_to_mask(boxes, SIDE, SIDE, self.loading.size) if boxes else None
        return Sample(self.decoded(record.id)[0], mask)


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
    labels = needed_csv(folder / "stage_2_train_labels.csv", names)
    boxes: dict[str, list[Box]] = {}
    for exam, x, y, width, height, target in labels[names].itertuples(index=False):
        found = boxes.setdefault(exam, [])
        if target == 1:
            found.append((x, y, x + width, y + height))
    table = pd.DataFrame({"id": list(boxes), "boxes": list(boxes.values())})
    table["label"] = table["boxes"].map(bool).astype(int)
    table["split"] = _authors_split(folder, table["id"])
    classes = read_csv(folder / "stage_2_detailed_class_info.csv", ["patientId", "class"])
    if classes is None:
        table = table[table["split"] != ""]
    else:
        kept = classes.loc[classes["class"].isin(CLASSES), "patientId"]
        table = table[table["id"].isin(kept)]
    return table[["id", "label", "split", "boxes"]].reset_index(drop=True)


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
