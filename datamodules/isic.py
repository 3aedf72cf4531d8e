"""ISIC 2018: dermoscopic images with diagnoses, lesion outlines and masks of visual features."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from datamodules.base import (
    Augmentation,
    ImageDataModule,
    Loading,
    Record,
    Sample,
    Split,
    data_root,
)
from datamodules.decoded import needed_csv, read_csv
from datamodules.images import read_image, read_mask, resize_image, resize_mask

ATTRIBUTES = ("globules", "milia_like_cyst", "negative_network", "pigment_network", "streaks")
PARTS: dict[str, Split] = {"Training": "train", "Validation": "val", "Test": "test"}


class ISIC2018(ImageDataModule):
    """Dermoscopic images of tasks 1 and 2 (outlines, visual features) or of task 3 (diagnoses).

    The folder holds the downloads with their own names, for each part (Training, Validation, Test):

    - tasks 1 and 2: ``ISIC2018_Task1-2_<part>_Input/<id>.jpg``,
      ``ISIC2018_Task1_<part>_GroundTruth/<id>_segmentation.png`` and
      ``ISIC2018_Task2_<part>_GroundTruth_v3/<id>_attribute_<feature>.png``;
    - task 3: ``ISIC2018_Task3_<part>_Input/<id>.jpg`` and the CSV in
      ``ISIC2018_Task3_<part>_GroundTruth``.

    The parts that are there are read; with fewer than three the splits are drawn from the seed.
    Images without a diagnosis of the classes are left out.

    Args:
        folder: Of the downloads, relative to the data root.
        task: "features" are the images of tasks 1 and 2, "diagnosis" those of task 3.
        classes: Diagnoses (columns of the table) merged into each class, the first class in order
            is the normal one; None takes ``{nevus: [NV], melanoma: [MEL]}`` for task 3, and nevus
            (neither of its two columns) against melanoma for tasks 1 and 2.
        diagnoses: Table of tasks 1 and 2 with a column image_id or image and a column of 0 and 1
            for each diagnosis: by default that of ISIC 2017 part 3, whose images these are. A line
            with none of them is a nevus (column "nevus").
        evidence: The mask: the union of the visual features, or the outline of the lesion.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of a drawn split.
        fold: Test fold of a cross-validation, instead of the parts.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing, or a class is of no diagnosis.

    Source: Codella et al., arXiv:1902.03368; Tschandl et al., Scientific Data 5:180161, 2018.
    """

    def __init__(
        self,
        folder: str = "isic2018",
        task: Literal["features", "diagnosis"] = "features",
        classes: dict[str, list[str]] | None = None,
        diagnoses: str = "ISIC-2017_Training_Part3_GroundTruth.csv",
        evidence: Literal["features", "lesion"] = "features",
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder, self.task = data_root() / folder, task
        self.diagnoses, self.evidence = self.folder / diagnoses, evidence
        two = ("nevus", "melanoma") if task == "features" else ("NV", "MEL")
        self.classes = classes or {"nevus": [two[0]], "melanoma": [two[1]]}
        self.class_names = tuple(self.classes)
        self.feature_names = ATTRIBUTES if task == "features" else ()

    @cached_property
    def files(self) -> dict[str, tuple[Split, Path]]:
        """Split and file of every image, by id."""
        number = "1-2" if self.task == "features" else "3"
        return {
            path.stem: (split, path)
            for part, split in PARTS.items()
            for path in sorted(self.folder.glob(f"ISIC2018_Task{number}_{part}_Input/*.jpg"))
        }

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label of every image with a diagnosis of the classes."""
        tables = [self.diagnoses]
        if self.task == "diagnosis":
            tables = sorted(self.folder.glob("ISIC2018_Task3_*_GroundTruth/*_GroundTruth.csv"))
        labels: dict[str, int] = {}
        class_of = {name: k for k, names in enumerate(self.classes.values()) for name in names}
        for path in tables:
            table = needed_csv(path, [])
            table = table.set_index(str(table.columns[0])).select_dtypes("number")
            if self.task == "features":
                table["nevus"] = 1 - table.max(axis=1)
            if unknown := sorted(set(class_of) - set(map(str, table.columns))):
                raise ValueError(f"classes name {unknown}; {path} has {[*table.columns]}.")
            chosen = table[list(class_of)]
            found = chosen[chosen.max(axis=1) == 1].idxmax(axis=1)
            labels |= {str(name): class_of[str(diagnosis)] for name, diagnosis in found.items()}
        return labels

    @cached_property
    def lesions(self) -> dict[str, str]:
        """Lesion of every image of task 3, whose images of one lesion never part."""
        name = "ISIC2018_Task3_Training_LesionGroupings.csv"
        found = sorted(self.folder.glob(f"**/{name}"))
        table = read_csv(found[0], ["image", "lesion_id"]) if found else None
        return {} if table is None else dict(zip(table["image"], table["lesion_id"], strict=True))

    def records(self) -> list[Record]:
        """Every image with a diagnosis of the classes."""
        if not self.files:
            raise ValueError(f"{self.folder} has no images of ISIC 2018; unpack them there.")
        known = {k: place for k, place in self.files.items() if k in self.labels}
        published = len({split for split, _ in known.values()}) == len(PARTS)
        return [
            Record(name, self.labels[name], split if published else "", self.lesions.get(name, ""))
            for name, (split, _) in known.items()
        ]

    def read(self, record: Record) -> Sample:
        """Image, features and evidence of one record; None without any."""
        path, size = self.files[record.id][1], self.loading.size
        image = read_image(path, self.loading.channels)
        features = {
            name: resize_mask(mask, size)
            for name in self.feature_names
            for file in self._masks("2", f"{record.id}_attribute_{name}.png")
            if (mask := read_mask(file)).any()
        }
        masks = list(features.values())
        if self.evidence == "lesion":
            outlines = self._masks("1", f"{record.id}_segmentation.png")
            masks = [resize_mask(read_mask(file), size) for file in outlines]
        union = torch.stack(masks).any(0) if masks else None
        return Sample(resize_image(image, size), union, features)

    def _masks(self, task: str, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"ISIC2018_Task{task}_*_GroundTruth*/{name}"))
