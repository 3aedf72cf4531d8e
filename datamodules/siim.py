"""SIIM-ACR Pneumothorax Segmentation: chest X-rays with outlines, run-length encoded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from datamodules.base import Augmentation, Loading, Record, Sample
from datamodules.decoded import Decoded, needed_csv
from datamodules.images import resize_mask

SIDE = 1024  # pixels of every image of the challenge, and of its masks
TABLES = ("stage_2_train.csv", "train-rle.csv", "train-rle-sample.csv")


class SIIMPneumothorax(Decoded):
    """Chest X-rays, healthy against pneumothorax, with masks of the pneumothorax.

    The folder holds the challenge's files: ``stage_2_train.csv`` or ``train-rle.csv`` and
    ``<images>/**/*.dcm``. The split is drawn from the seed.

    Args:
        folder: Of the download, relative to the data root.
        images: Folder of the images in it.
        cache: Folder of the decoded images, relative to the data root; None is ``cache`` in
            ``folder``.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of the split.
        fold: Test fold of a cross-validation.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing, or a mask does not lie inside its image.

    Source: SIIM-ACR Pneumothorax Segmentation, Kaggle 2019.
    """

    class_names = ("healthy", "pneumothorax")

    def __init__(
        self,
        folder: str = "siim",
        images: str = "dicom-images-train",
        cache: str | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(folder, cache, loading, augmentation, seed, fold, folds)
        self.images = self.folder / images

    @cached_property
    def runs(self) -> dict[str, list[str]]:
        """Encoded masks of every image; none for a healthy one."""
        path = next((p for name in TABLES if (p := self.folder / name).is_file()), None)
        table: pd.DataFrame = needed_csv(path or self.folder / TABLES[0], ["ImageId"])
        runs: dict[str, list[str]] = {}
        for name, text in table.iloc[:, :2].astype(str).itertuples(index=False):
            found = runs.setdefault(name, [])
            if text.strip() != "-1":
                found.append(text)
        return runs

    def records(self) -> list[Record]:
        """Every image, in the order of the table."""
        return [Record(name, int(bool(runs))) for name, runs in self.runs.items()]

    def paths(self) -> dict[str, Path]:
        """DICOM file of every image."""
        found = {path.stem: path for path in self.images.glob("**/*.dcm")}
        return {name: found.get(name, self.images / f"{name}.dcm") for name in self.runs}

    def read(self, record: Record) -> Sample:
        """Decoded image and the union of its masks; None for a healthy one."""
        image, _ = self.decoded(record.id)
        if not self.runs[record.id]:
            return Sample(image, None)
        try:
            masks = [relative_runs_to_mask(text, SIDE, SIDE) for text in self.runs[record.id]]
        except ValueError as error:
            raise ValueError(f"Image {record.id!r}: {error}") from error
        return Sample(image, resize_mask(torch.stack(masks).any(0), self.loading.size))


def relative_runs_to_mask(text: str, height: int, width: int) -> Bool[Tensor, "h w"]:
    """Mask from pairs "gap length", each gap counted from the end of the run before, by columns.

    Raises:
        ValueError: If the text is not such pairs, or they leave the image.
    """
    try:
        numbers = torch.tensor([int(word) for word in text.split()]).view(-1, 2)
        ends = numbers.flatten().cumsum(0)
        inside = int(numbers.min()) >= 0 and int(ends[-1]) <= height * width
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"a mask must be pairs of numbers, but got {text[:40]!r}.") from error
    if not inside:
        raise ValueError(f"a mask must lie in {height} x {width} pixels, but got {text[:40]!r}.")
    flips = torch.zeros(height * width + 1, dtype=torch.int32)
    flips.index_add_(0, ends, torch.tensor([1, -1], dtype=torch.int32).repeat(len(numbers)))
    return (flips[:-1].cumsum(0) > 0).view(width, height).T
