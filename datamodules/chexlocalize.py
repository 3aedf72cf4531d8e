"""CheXpert with the radiologists' outlines of CheXlocalize."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from skimage.draw import polygon2mask
from torch import Tensor

from datamodules.base import (
    Augmentation,
    ImageDataModule,
    Loading,
    Record,
    Sample,
    Split,
    data_root,
)
from datamodules.decoded import needed_csv
from datamodules.images import read_image, resize_image, resize_mask

Polygon = Sequence[Sequence[float]]  # corners (x, y) in pixels of the image
OUTLINED = {"Lung Opacity": "Airspace Opacity"}  # CheXpert's name: CheXlocalize's


class Study(NamedTuple):
    """A frontal image: its file, the patient, and 1 (positive) or 0 for the findings together."""

    image: Path
    patient: str
    label: int


class CheXlocalize(ImageDataModule):
    """CheXpert's training images, and the validation and test images that have outlines.

    ``<folder>/CheXpert/val_labels.csv``, ``test_labels.csv`` and the images they name,
    ``<folder>/CheXlocalize/gt_annotations_val.json`` and ``gt_annotations_test.json``;
    ``<training>/train.csv`` of CheXpert and its images. Frontal views alone. An image is positive
    with any of the findings, negative without all of them, and left out where one is uncertain.

    Args:
        folder: Of CheXlocalize, relative to the data root.
        training: Of CheXpert, relative to the data root.
        findings: CheXpert's names, one feature each.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of the folds.
        fold: Test fold of a cross-validation, instead of the published split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing, or an outline is of another size than its image.

    Source: Irvin et al., AAAI 2019; Saporta et al., Nature Machine Intelligence 4:867, 2022.
    """

    class_names = ("negative", "positive")

    def __init__(
        self,
        folder: str = "chexlocalize",
        training: str = "CheXpert-v1.0-small",
        findings: tuple[str, ...] = ("Pleural Effusion",),
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder, self.training = data_root() / folder, data_root() / training
        self.feature_names = findings

    @cached_property
    def studies(self) -> dict[Split, dict[str, Study]]:
        """Images by split and name, "patient64622_study1_view1_frontal"."""
        held = self.folder / "CheXpert"
        return {
            "train": self._studies(self.training / "train.csv", self.training / "train"),
            "val": self._studies(held / "val_labels.csv", held / "val"),
            "test": self._studies(held / "test_labels.csv", held / "test"),
        }

    @cached_property
    def outlines(self) -> dict[str, dict[str, Any]]:
        """Polygons by image and finding; "img_size" among them is height and width."""
        outlines: dict[str, dict[str, Any]] = {}
        for split in ("val", "test"):
            path = self.folder / "CheXlocalize" / f"gt_annotations_{split}.json"
            if not path.is_file():
                raise ValueError(f"Annotations {path} are missing; unpack CheXlocalize there.")
            outlines |= json.loads(path.read_text())
        return outlines

    def records(self) -> list[Record]:
        """Every frontal image of the three tables."""
        return [
            Record(name, study.label, split, study.patient)
            for split, studies in self.studies.items()
            for name, study in studies.items()
        ]

    def read(self, record: Record) -> Sample:
        """Image and outlines of one record; None where none of the findings is outlined."""
        path = next(s[record.id].image for s in self.studies.values() if record.id in s)
        image, size = read_image(path, self.loading.channels), self.loading.size
        outlined = self.outlines.get(record.id, {})
        masks = {}
        for finding in self.feature_names:
            polygons = outlined.get(OUTLINED.get(finding, finding))
            if polygons:
                masks[finding] = polygons_to_mask(polygons, *outlined["img_size"])
        for mask in masks.values():
            if mask.shape != image.shape[1:]:
                raise ValueError(
                    f"Outlines of {record.id} are for {tuple(mask.shape)} pixels, but {path} has "
                    f"{tuple(image.shape[1:])}; take the images that come with CheXlocalize."
                )
        union = torch.stack([*masks.values()]).any(0) if masks else None
        return Sample(
            resize_image(image, size),
            None if union is None else resize_mask(union, size),
            {name: resize_mask(mask, size) for name, mask in masks.items()},
        )

    def _studies(self, table: Path, images: Path) -> dict[str, Study]:
        lines = needed_csv(table, ["Path", *self.feature_names])
        frontal = lines[lines["Path"].str.contains("frontal")]
        values = frontal[list(self.feature_names)].fillna(0)
        certain = ~(values == -1).any(axis=1)
        labels = (values == 1).any(axis=1).astype(int)
        studies = {}
        for path, label in zip(frontal["Path"][certain], labels[certain], strict=True):
            parts = Path(path).parts[-3:]  # patient, study, view
            name = "_".join([*parts[:2], Path(parts[2]).stem])
            studies[name] = Study(images.joinpath(*parts), parts[0], int(label))
        return studies


def polygons_to_mask(polygons: Sequence[Polygon], height: int, width: int) -> Bool[Tensor, "h w"]:
    """Union of polygons with corners (x, y) in pixels; one of fewer than 3 corners is empty."""
    masks = [
        polygon2mask((height, width), [(y, x) for x, y in polygon])
        for polygon in polygons
        if len(polygon) > 2
    ]
    empty = torch.zeros(height, width, dtype=torch.bool)
    return torch.stack([empty, *map(torch.from_numpy, masks)]).any(0)
