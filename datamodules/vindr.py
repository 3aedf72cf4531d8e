"""VinDr-CXR: chest X-rays with boxes by radiologists."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from datamodules.base import Augmentation, Loading, Record, Sample, split_by_seed
from datamodules.decoded import Decoded, needed_csv
from datamodules.images import Box

NONE = "No finding"
COLUMNS = ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"]


class VinDrCXR(Decoded):
    """15,000 chest X-rays read by three radiologists each, 3,000 for test read in consensus.

    The folder holds the download: ``annotations/annotations_train.csv`` and
    ``annotations_test.csv``, ``train/*.dicom`` and ``test/*.dicom``. An image is healthy if all
    its readers found nothing; positive if enough of them drew a box of a chosen finding; others
    are left out. The evidence is the union of all their boxes of the chosen findings.

    Args:
        folder: Of the download, relative to the data root.
        findings: Names of the boxes, one feature each; None takes all of the training table.
        readers: Radiologists, 1 to 3, who must have drawn a chosen finding in a training image.
        cache: Folder of the decoded images, relative to the data root; None is ``cache`` in
            ``folder``.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the tenth of the training images that is for validation.
        fold: Test fold of a cross-validation, instead of the published split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing, or there is no such finding or number of readers.

    Source: Nguyen et al., Scientific Data 9:429, 2022.
    """

    class_names = ("healthy", "finding")

    def __init__(
        self,
        folder: str = "vindr-cxr",
        findings: tuple[str, ...] | None = None,
        readers: int = 2,
        cache: str | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(folder, cache, loading, augmentation, seed, fold, folds)
        if not 1 <= readers <= 3:
            raise ValueError(f"readers must be 1 to 3, as many as read an image, got {readers}.")
        known = set(self.annotations["class_name"]) - {NONE}
        if unknown := sorted(set(findings or ()) - known):
            raise ValueError(f"findings name {unknown}; the tables have {sorted(known)}.")
        self.feature_names, self.readers = findings or tuple(sorted(known)), readers

    @cached_property
    def annotations(self) -> pd.DataFrame:
        """A line for every box, or for every reader who found nothing, with the column part."""
        parts = []
        for part in ("train", "test"):
            path = self.folder / "annotations" / f"annotations_{part}.csv"
            table = needed_csv(path, COLUMNS + ["rad_id"] * (part == "train"))
            parts.append(table.assign(part=part))
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def part_of(self) -> dict[str, Literal["train", "test"]]:
        """Published part of every image."""
        return dict(zip(self.annotations["image_id"], self.annotations["part"], strict=True))

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label of every image that is kept."""
        table = self.annotations.assign(
            chosen=self.annotations["class_name"].isin(self.feature_names)
        )
        labels: dict[str, int] = {}
        for (name, part), lines in table.groupby(["image_id", "part"], sort=False):
            found = lines[lines["chosen"]]
            if (lines["class_name"] == NONE).all():
                labels[str(name)] = 0
            elif len(found) and (part == "test" or found["rad_id"].nunique() >= self.readers):
                labels[str(name)] = 1
        return labels

    @cached_property
    def boxes(self) -> dict[str, dict[str, list[Box]]]:
        """Boxes of the chosen findings by image and finding, pixels of the image."""
        chosen = self.annotations[self.annotations["class_name"].isin(self.feature_names)]
        boxes: dict[str, dict[str, list[Box]]] = {}
        for name, finding, *box in chosen[COLUMNS].itertuples(index=False):
            boxes.setdefault(name, {}).setdefault(finding, []).append(tuple(box))
        return boxes

    def records(self) -> list[Record]:
        """Every image that is kept, training first."""
        records = [Record(name, label) for name, label in self.labels.items()]
        drawn = split_by_seed([r for r in records if self.part_of[r.id] == "train"], self.seed)
        validation = {record.id for record in drawn["val"]}
        return [
            replace(record, split="val" if record.id in validation else self.part_of[record.id])
            for record in records
        ]

    def paths(self) -> dict[str, Path]:
        """DICOM file of every image that is kept."""
        return {name: self.folder / self.part_of[name] / f"{name}.dicom" for name in self.labels}

    def read(self, record: Record) -> Sample:
        """Decoded image and boxes of one record; None for a healthy one."""
        return self.boxed(record.id, self.boxes.get(record.id, {}) if record.label else {})
