"""Any folder of labelled images, listed in a CSV table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int8
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from datamodules.base import (
    Augmentation,
    ImageDataModule,
    Loading,
    Record,
    Sample,
    data_root,
)
from datamodules.coco import annotation_mask, coco_lines
from datamodules.images import (
    Box,
    boxes_to_mask,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)

OWN_COLUMNS = {"id", "image", "mask", "boxes", "importance", "annotations", "split"}
SplitCell = Literal["", "train", "val", "test"]
SPLIT_CELLS: dict[str, SplitCell] = {"": "", "train": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One line of the table, checked as far as is possible without reading the image.

    Attributes:
        place: Table and line, for error messages.
        record: What the data module lists.
        image: File of the image.
        mask: File of the mask, if the table names one.
        features: Files of the masks of single kinds of evidence, by name.
        importance: File of the image of relevance levels, if the table names one.
        boxes: Evidence in pixels of the image; not used if there is a mask.
        annotations: COCO's annotations, each with its category.
    """

    place: str
    record: Record
    image: Path
    mask: Path | None
    features: dict[str, Path]
    importance: Path | None
    boxes: tuple[Box, ...]
    annotations: tuple[Mapping[str, Any], ...]


class ImageTable(ImageDataModule):
    """Images of a CSV table, one per row, or of a COCO file (.json).

    Columns: ``image`` (path relative to the table's folder; it is the id unless there is a column
    ``id``) and ``label``; optional ``mask`` (path of an image, non-zero inside the evidence),
    ``mask_<feature>`` for each kind of evidence (their union is the evidence without ``mask``),
    ``boxes`` (JSON list of [x0, y0, x1, y1], half-open, pixels of the image; a mask goes first),
    ``importance`` (path of a grey image of the regions' relevance, see levels), ``split`` (train,
    val or test; empty is drawn from the seed), ``group``. Other columns go into the batch as text.
    Of a COCO file the label is the names of an image's categories, sorted and joined by " + ", or
    "none"; the features are its categories; further entries of its images are the columns.

    Args:
        table: CSV or COCO file, relative to the data root.
        classes: Labels in the order of the classes, the first one without evidence; or for each
            class the labels merged into it; None takes the labels of the table, sorted.
        group: Column whose images never part; None takes "group" if the table has it.
        features: Kinds of evidence that have columns of masks; none by default.
        folder: Of the files that the table names, relative to its own folder.
        levels: Relevance (3 the most relevant .. -1) of each grey value, 0 to 255, in the images of
            the column importance. Without another annotation the evidence is the most relevant
            level.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the splits that the table leaves open.
        fold: Test fold of a cross-validation, instead of the table's splits.
        folds: Number of folds.

    Raises:
        ValueError: If the table breaks a rule; the sentence names the line and the value.
    """

    def __init__(
        self,
        table: str,
        classes: list[str] | dict[str, list[str]] | None = None,
        group: str | None = None,
        features: list[str] | None = None,
        folder: str = "",
        levels: dict[int, int] | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.table, self.group = data_root() / table, group
        self.files, self.levels = self.table.parent / folder, levels or {}
        self.feature_names = tuple(features or ())
        if classes is None:
            classes = sorted({row["label"] for _, row in _lines(self.table)} - {""})
        merged = classes if isinstance(classes, dict) else {name: [name] for name in classes}
        self.class_names = tuple(merged)
        self.class_of = {
            label: index for index, labels in enumerate(merged.values()) for label in labels
        }

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The checked rows by id."""
        rows: dict[str, Row] = {}
        for place, line in _lines(self.table):
            row = self._parse(place, line)
            if row.record.id in rows:
                raise ValueError(
                    f"{place}: image {row.record.id!r} is listed twice, first in "
                    f"{rows[row.record.id].place}; keep one of the two."
                )
            rows[row.record.id] = row
        return rows

    def records(self) -> list[Record]:
        """Every row of the table, in its order."""
        return [row.record for row in self.rows.values()]

    def read(self, record: Record) -> Sample:
        """Image and evidence (mask, else boxes, else None) of one row."""
        row, size = self.rows[record.id], self.loading.size
        try:
            image = read_image(row.image, self.loading.channels)
            files = ({"": row.mask} if row.mask else {}) | row.features
            masks = {name: read_mask(path) for name, path in files.items()}
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        height, width = image.shape[1:]
        for name, mask in masks.items():
            if mask.shape != (height, width):
                raise ValueError(
                    f"{row.place}: mask {files[name]} must have the image's size {height} x "
                    f"{width}, but has {mask.shape[0]} x {mask.shape[1]}."
                )
        for box in row.boxes:
            if box[2] > width or box[3] > height:
                raise ValueError(
                    f"{row.place}: box {list(box)} must lie inside the image, which is {width} "
                    f"pixels wide and {height} high."
                )
        union = boxes_to_mask(row.boxes, height, width, size) if row.boxes else None
        if masks:
            whole = masks.pop("", None)
            union = resize_mask(
                torch.stack([*masks.values()]).any(0) if whole is None else whole, size
            )
        features = {name: resize_mask(mask, size) for name, mask in masks.items()}
        try:
            for each in row.annotations:
                drawn, name = annotation_mask(each, height, width, size), each["category"]
                features[name] = drawn | features.get(name, drawn)
                union = drawn if union is None else union | drawn
            importance = self._importance(row.importance) if row.importance else None
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        if union is None and importance is not None:
            union = importance == max(self.levels.values())
        return Sample(resize_image(image, size), union, features, importance)

    def _importance(self, path: Path) -> Int8[Tensor, "h w"]:
        """Levels of a grey image, brought to the loaded size by its nearest pixels."""
        grey = (read_image(path, 1) * 255).round().to(torch.uint8)
        found = grey.unique().tolist()
        if unknown := sorted(set(found) - set(self.levels)):
            raise ValueError(f"levels have no relevance for the values {unknown} of {path}.")
        table = torch.zeros(256, dtype=torch.int8)
        for value in found:
            table[value] = self.levels[value]
        size = [self.loading.size, self.loading.size]
        near: Tensor = resize(grey, size, InterpolationMode.NEAREST_EXACT)
        return table[near[0].long()]

    def _parse(self, place: str, line: dict[str, str]) -> Row:
        label, group = line["label"], self.group or "group"
        if label not in self.class_of:
            known = ", ".join(self.class_of)
            raise ValueError(f"{place}: label {label!r} is unknown; the known ones are {known}.")
        if self.group is not None and self.group not in line:
            columns = ", ".join(line)
            raise ValueError(f"{place}: there is no group column {group!r}, only {columns}.")
        masks = {f"mask_{name}": name for name in self.feature_names}
        if "annotations" in line:
            masks = {}  # the categories are the features
        for column in masks:
            if column not in line:
                raise ValueError(
                    f"{place}: column {column!r} is missing, but the features name it."
                )
        record = Record(
            id=line.get("id") or line["image"],
            label=self.class_of[label],
            split=_split(place, line.get("split", "")),
            group=line.get(group, ""),
            columns={k: text for k, text in line.items() if k not in OWN_COLUMNS | {*masks}},
        )
        image = _existing(place, "image", self.files / line["image"])
        mask, importance = line.get("mask"), line.get("importance")
        return Row(
            place,
            record,
            image,
            _existing(place, "mask", self.files / mask) if mask else None,
            {
                name: _existing(place, column, self.files / line[column])
                for column, name in masks.items()
                if line[column]
            },
            _existing(place, "importance", self.files / importance) if importance else None,
            _boxes(place, line.get("boxes", "")),
            tuple(json.loads(line.get("annotations") or "[]")),
        )


def _lines(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place (table and line of the file) and cells of each row."""
    if not table.is_file():
        raise ValueError(
            f"Table {table} does not exist; set SIMADV_DATA to the data folder, and table to its "
            "file in it."
        )
    if table.suffix == ".json":
        yield from coco_lines(table)
        return
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        columns = list(reader.fieldnames or [])
        for column in ("image", "label"):
            if column not in columns:
                raise ValueError(
                    f"Table {table}: column {column!r} is missing; it has {', '.join(columns)}."
                )
        for cells in reader:
            place = f"Table {table}, line {reader.line_num}"
            if None in cells:
                raise ValueError(f"{place}: there are more cells than the {len(columns)} columns.")
            yield place, {name: text.strip() for name, text in cells.items()}


def _split(place: str, text: str) -> SplitCell:
    if text not in SPLIT_CELLS:
        raise ValueError(f"{place}: split must be train, val, test or empty, but got {text!r}.")
    return SPLIT_CELLS[text]


def _existing(place: str, column: str, path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{place}: column {column!r} names {path}, which is not a file.")
    return path


def _boxes(place: str, text: str) -> tuple[Box, ...]:
    """Boxes of a JSON cell; whether they end inside the image is known only when it is read."""
    try:
        cells = json.loads(text or "[]")
        boxes = [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in cells]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{place}: boxes must be a JSON list of [x0, y0, x1, y1], but got {text!r}."
        ) from error
    for box in boxes:
        x0, y0, x1, y1 = box
        if not all(map(math.isfinite, box)) or not (0 <= x0 < x1 and 0 <= y0 < y1):
            raise ValueError(
                f"{place}: box {list(box)} must have finite 0 <= x0 < x1 and 0 <= y0 < y1."
            )
    return tuple(boxes)
