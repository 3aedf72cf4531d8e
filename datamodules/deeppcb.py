"""DeepPCB, printed circuit boards, in the layout of its public download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pandas as pd

from datamodules.base import Augmentation, ImageDataModule, Loading, Record, Sample, data_root
from datamodules.images import boxes_to_mask, read_image, resize_image

TYPES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # 1 to 6 in the files
SIDE, WINDOW = 640, 320  # pixels of an image and of the window cut from each pair

Defect = tuple[int, int, int, int, int]  # x0, y0, x1, y1 in pixels, half-open; type 1 to 6


@dataclass(frozen=True)
class Pair:
    """A tested board and its template: where they lie, and what is used of them.

    Attributes:
        group: Board.
        split: Of the committed list.
        corner: Left and top edge of the area used, pixels of the whole image.
        defects: In pixels of that area.
    """

    group: str
    split: Literal["train", "val", "test"]
    corner: tuple[int, int]
    defects: list[Defect]


class DeepPCB(ImageDataModule):
    """1498 aligned pairs of a tested board and its defect-free template, with boxes of the defects.

    Files: ``PCBData/group20085/20085/20085000_test.jpg``, ``20085000_temp.jpg`` beside it, and
    ``PCBData/group20085/20085_not/20085000.txt`` with lines ``x1 y1 x2 y2 type``. The committed
    split is by board (column ``group``). Columns ``pair`` and ``counterpart`` name the aligned
    image of the other class, ``types`` the defects in the order of the boxes.

    Args:
        folder: ``PCBData`` of the download, relative to the data root.
        area: "window" cuts the 320 x 320 pixels of each pair that hold only whole boxes, and
            binarises them at one half, as in the tables of the README; the committed list knows
            a window by its boxes. "whole" takes the image of 640 x 640 pixels as it is.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of the folds.
        fold: Test fold of a cross-validation, instead of the committed split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing or cannot be read, or an annotation is not one.

    Source: Tang et al., Online PCB defect detector on a new PCB defect dataset, arXiv:1902.06197.
    """

    class_names = ("normal", "defect")

    def __init__(
        self,
        folder: str = "PCBData",
        area: Literal["window", "whole"] = "window",
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder, self.area = data_root() / folder, area

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """Every committed pair by its number, its annotation read."""
        with (files("datamodules") / "split_ids" / "deeppcb.csv").open() as file:
            table = pd.read_csv(file, dtype=str)
        rows = zip(table["pair"], table["group"], table["split"], table["window"], strict=True)
        return {number: self._pair(number, *row) for number, *row in rows}

    def records(self) -> list[Record]:
        """Both images of every pair, the tested one first; ids as ``20085000_test``."""
        return [
            self._record(number, pair, label)
            for number, pair in self.pairs.items()
            for label in (1, 0)
        ]

    def read(self, record: Record) -> Sample:
        """Area of one image and its boxes; None for a template."""
        pair, size = self.pairs[record.columns["pair"]], self.loading.size
        path = self._path(record.id, pair)
        image = read_image(path, self.loading.channels)
        if image.shape[1:] != (SIDE, SIDE):
            raise ValueError(
                f"Image {path} must have {SIDE} x {SIDE} pixels, but has {tuple(image.shape[1:])}; "
                "restore the file from the download."
            )
        if self.area == "window":
            x, y = pair.corner
            image = (image[:, y : y + WINDOW, x : x + WINDOW] >= 0.5).float()
        side = image.shape[-1]
        boxes = [defect[:4] for defect in pair.defects]
        mask = boxes_to_mask(boxes, side, side, size) if record.label else None
        return Sample(resize_image(image, size), mask)

    def _pair(
        self, number: str, group: str, split: Literal["train", "val", "test"], window: str
    ) -> Pair:
        path = self.folder / group / f"{group.removeprefix('group')}_not" / f"{number}.txt"
        if not path.is_file():
            raise ValueError(f"Annotation {path} is missing; unpack the download of DeepPCB there.")
        whole = parse_defects(path.read_text().splitlines(), f"Annotation {path}")
        if self.area == "whole":
            return Pair(group, split, (0, 0), whole)
        inside = parse_defects(window.split(";"), f"Window of pair {number}")
        return Pair(group, split, find_window(whole, inside, f"Annotation {path}"), inside)

    def _record(self, number: str, pair: Pair, label: int) -> Record:
        name, other = ("test", "temp") if label else ("temp", "test")
        types = [TYPES[kind - 1] for *_, kind in pair.defects]
        columns = {
            "label": self.class_names[label],
            "types": json.dumps(types) if label else "",
            "counterpart": f"{number}_{other}",
            "pair": number,
            "group": pair.group,
        }
        path = self._path(f"{number}_{name}", pair)
        if not path.is_file():
            raise ValueError(f"Image {path} is missing; unpack the download of DeepPCB there.")
        return Record(path.stem, label, pair.split, pair.group, columns)

    def _path(self, name: str, pair: Pair) -> Path:
        return self.folder / pair.group / pair.group.removeprefix("group") / f"{name}.jpg"


def parse_defects(lines: Sequence[str], place: str) -> list[Defect]:
    """Defects of an annotation, one ``x1 y1 x2 y2 type`` per line; empty lines are skipped.

    Raises:
        ValueError: If a line is not of that form or its box lies outside the image; the sentence
            begins with ``place``.
    """
    defects: list[Defect] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            x0, y0, x1, y1, kind = map(int, line.replace(",", " ").split())
        except ValueError:
            x0 = y0 = x1 = y1 = kind = 0
        if not (0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE and 1 <= kind <= len(TYPES)):
            raise ValueError(
                f"{place}, line {number}: must be 'x1 y1 x2 y2 type' with x1 < x2 and y1 < y2 in "
                f"0 to {SIDE} and type 1 to {len(TYPES)}, but got {line!r}."
            )
        defects.append((x0, y0, x1, y1, kind))
    return defects


def find_window(whole: list[Defect], inside: list[Defect], place: str) -> tuple[int, int]:
    """Left and top edge of the window with the boxes ``inside``, in an image with all of ``whole``.

    Raises:
        ValueError: If no shift of ``inside`` fits; the sentence begins with ``place``.
    """
    for left, top in {(box[0] - inside[0][0], box[1] - inside[0][1]): None for box in whole}:
        shifted = {(x0 + left, y0 + top, x1 + left, y1 + top, k) for x0, y0, x1, y1, k in inside}
        if shifted <= set(whole) and 0 <= left <= SIDE - WINDOW and 0 <= top <= SIDE - WINDOW:
            return left, top
    raise ValueError(f"{place}: its boxes do not hold the committed window; use area: whole.")
