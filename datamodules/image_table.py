"""Any folder of labelled images, listed in a CSV table."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
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
    Split,
    data_root,
)
from datamodules.coco import annotation_mask, as_box, coco_lines
from datamodules.images import (
    BadImage,
    Box,
    boxes_to_mask,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)

OWN_COLUMNS = {"id", "image", "mask", "boxes", "importance", "annotations", "split"}
SEPARATORS = (",", ";", "\t")
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

    @property
    def annotated(self) -> bool:
        """Whether any evidence is named."""
        named = self.mask, self.features, self.importance, self.boxes, self.annotations
        return any(map(bool, named))


class ImageTable(ImageDataModule):
    """Images of a CSV table, one per row, or of a COCO file (.json).

    Columns: ``image`` (path relative to the table's folder; it is the id unless there is a column
    ``id``) and ``label``; optional ``mask`` (path of an image, non-zero inside the evidence),
    ``mask_<feature>`` for each kind of evidence (their union is the evidence without ``mask``),
    ``boxes`` (JSON list of [x0, y0, x1, y1], half-open, pixels of the image; a mask goes first),
    ``importance`` (path of a grey image of the regions' relevance, see levels), ``split`` (train,
    val or test; empty is drawn from the seed), ``group``. Other columns go into the batch as text.
    A CSV is in UTF-8, or in UTF-16 with its mark, its cells part by commas, semicolons or tabs.
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
        roots: Further folders, relative to the data root, that its files may lie in, whether by an
            absolute path, by ".." or by a link; by default the table's own, ``folder`` and, for a
            table in the data root, the whole of that.

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
        roots: list[str] | None = None,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.table, self.group = data_root() / table, group
        self.files, self.levels = self.table.parent / folder, levels or {}
        within = [data_root()] * (data_root().resolve() in self.table.resolve().parents)
        further = [data_root() / root for root in roots or ()]
        self.roots = [root.resolve() for root in (self.table.parent, self.files, *within, *further)]
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
        home: dict[str, Row] = {}
        for place, line in _lines(self.table):
            row = self._parse(place, line)
            record = row.record
            if record.id in rows:
                raise ValueError(
                    f"{place}: image {_short(record.id)} is listed twice, first in "
                    f"{rows[record.id].place}; keep one of the two."
                )
            rows[record.id] = row
            first = home.setdefault(record.group, row) if record.group else row
            if first.record.split != record.split and self.fold is None:
                raise ValueError(
                    f"{place}: column {self.group or 'group'!r} has {_short(record.group)} in "
                    f"split {record.split!r}, but {first.place} has it in {first.record.split!r}; "
                    "put all images of a group into one split."
                )
        if not rows:
            raise ValueError(f"Table {self.table} lists no image; give it a row for each.")
        annotated = {row.record.label for row in rows.values() if row.annotated}
        if annotated == {0} and len(self.class_names) > 1:
            warnings.warn(
                f"Table {self.table}: only images of {self.class_names[0]!r} have evidence, but "
                "the first class is taken for the normal one; name the classes in that order.",
                stacklevel=2,
            )
        return rows

    def divide(self, records: Sequence[Record]) -> dict[Split, list[Record]]:
        """As every data module, but errors name the table."""
        try:
            return super().divide(records)
        except ValueError as error:
            raise ValueError(f"Table {self.table}: {error}") from error

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
        except BadImage as error:
            raise BadImage(f"{row.place}: {error}") from error
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
            raise type(error)(f"{row.place}: {error}") from error
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
            raise ValueError(
                f"{place}: label {_short(label)} is unknown; the known ones are {known}."
            )
        if self.group is not None and self.group not in line:
            columns = _listed(line)
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
        image = self._existing(place, "image", line["image"])
        mask, importance = line.get("mask"), line.get("importance")
        return Row(
            place,
            record,
            image,
            self._existing(place, "mask", mask) if mask else None,
            {
                name: self._existing(place, column, line[column])
                for column, name in masks.items()
                if line[column]
            },
            self._existing(place, "importance", importance) if importance else None,
            _boxes(place, line.get("boxes", "")),
            _annotations(place, line.get("annotations", "")),
        )

    def _existing(self, place: str, column: str, text: str) -> Path:
        """The file that a cell names, within the folders that are allowed."""
        if not text or any(ord(letter) < 32 for letter in text):
            raise ValueError(
                f"{place}: column {column!r} must name a file, but got {_short(text)}; correct it."
            )
        path = self.files / text
        told = f"{place}: column {column!r} names {_cut(str(path))}, which"
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in self.roots):
            raise ValueError(
                f"{told} lies outside {self.roots[0]}; move it there, or add its folder to roots."
            )
        if not os.path.isfile(path):  # which takes names that are too long
            raise ValueError(f"{told} is not a file; put it there or correct the cell.")
        return path


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
    text = _text(table)
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=_separator(text), strict=True)
    try:
        columns = _columns(table, reader.fieldnames or [])
        reader.fieldnames = columns
        for cells in reader:
            place = f"Table {table}, line {reader.line_num}"
            if None in cells or None in cells.values():
                much = "more" if None in cells else "fewer"
                raise ValueError(
                    f"{place}: there are {much} cells than the {len(columns)} columns; correct the "
                    "line."
                )
            yield place, {name: cell.strip() for name, cell in cells.items()}
    except csv.Error as error:
        raise ValueError(
            f"Table {table}, line {reader.reader.line_num}: this is no CSV ({error}); save it anew."
        ) from error


def _text(table: Path) -> str:
    """Content of a table in UTF-8, or in UTF-16 with its mark."""
    content = table.read_bytes()
    wide = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"Table {table}, line {line}: byte {content[error.start]:#x} is not in UTF-8; save the "
            "table as UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"Table {table}, line {line}: there is a NUL character; save it as UTF-8.")
    return text


def _separator(text: str) -> str:
    """What parts the needed columns in the first line; else a comma."""
    first = text.splitlines()[0] if text else ""
    needed = {"image", "label"}
    parted = {mark: {name.strip(' "') for name in first.split(mark)} for mark in SEPARATORS}
    return next((mark for mark in SEPARATORS if needed <= parted[mark]), ",")


def _columns(table: Path, header: Sequence[str]) -> list[str]:
    """The checked names of the columns."""
    columns = [name.strip() for name in header]
    for column in ("image", "label"):
        if column not in columns:
            raise ValueError(
                f"Table {table}: column {column!r} is missing; it has {_listed(columns)}."
            )
    for column in filter(None, columns):
        if columns.count(column) > 1:
            raise ValueError(f"Table {table}: column {_short(column)} comes twice; keep one.")
    return columns


def _split(place: str, text: str) -> SplitCell:
    if text not in SPLIT_CELLS:
        raise ValueError(
            f"{place}: split must be train, val, test or empty, but got {_short(text)}."
        )
    return SPLIT_CELLS[text]


def _boxes(place: str, text: str) -> tuple[Box, ...]:
    """Boxes of a JSON cell; whether they end inside the image is known only when it is read."""
    try:
        boxes = [as_box(cell) for cell in json.loads(text or "[]")]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{place}: boxes must be a JSON list of [x0, y0, x1, y1], but got {_short(text)}."
        ) from error
    for box in boxes:
        x0, y0, x1, y1 = box
        if not all(map(math.isfinite, box)) or not (0 <= x0 < x1 and 0 <= y0 < y1):
            raise ValueError(
                f"{place}: box {list(box)} must have finite 0 <= x0 < x1 and 0 <= y0 < y1."
            )
    return tuple(boxes)


def _annotations(place: str, text: str) -> tuple[Mapping[str, Any], ...]:
    """COCO's annotations of a JSON cell."""
    try:
        found = json.loads(text or "[]")
        if all(isinstance(each["category"], str) for each in found):
            return tuple(found)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # told below, as is a category that is no text
    raise ValueError(
        f"{place}: annotations must be a JSON list of COCO's, with a category each, but got "
        f"{_short(text)}."
    )


def _short(text: str) -> str:
    """A cell as errors quote it."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _cut(path: str) -> str:
    """A path as errors name it: whole, unless no file could have it."""
    return path if len(path) <= 4096 else f"{path[:80]}..."


def _listed(columns: Iterable[str]) -> str:
    """Names of columns as errors list them."""
    return _cut(" ".join(", ".join(columns).split())) or "none"
