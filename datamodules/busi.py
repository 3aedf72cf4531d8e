"""BUSI, breast ultrasound, in the layout of its public download."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import pandas as pd
import torch

from datamodules.base import Augmentation, ImageDataModule, Loading, Record, Sample, data_root
from datamodules.images import read_image, read_mask, resize_image, resize_mask

CLASSES = {"lesion": ("normal", "lesion"), "three": ("normal", "benign", "malignant")}


class BUSI(ImageDataModule):
    """780 breast ultrasound images, 647 of them with the outline of one to three lesions.

    ``Dataset_BUSI_with_GT/benign/benign (1).png`` has the mask ``benign (1)_mask.png`` and, for
    further lesions, ``benign (1)_mask_1.png``; the masks of an image are merged. The committed
    split keeps near-duplicates together (column ``dup_group``). The column ``label`` tells benign
    from malignant in either task.

    Args:
        folder: Of the download, relative to the data root.
        task: Lesion against normal, or the three labels.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of the folds.
        fold: Test fold of a cross-validation, instead of the committed split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing or cannot be read, or a mask has another size.

    Source: Al-Dhabyani et al., Dataset of breast ultrasound images, Data in Brief 28:104863, 2020.
    """

    def __init__(
        self,
        folder: str = "Dataset_BUSI_with_GT",
        task: Literal["lesion", "three"] = "lesion",
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.folder, self.class_names = data_root() / folder, CLASSES[task]

    def records(self) -> list[Record]:
        """Every image of the committed list; the id is the name without its ending."""
        with (files("datamodules") / "split_ids" / "busi.csv").open() as file:
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        rows = zip(table["name"], table["dup_group"], table["split"], strict=True)
        return [self._record(name, group, split) for name, group, split in rows]

    def read(self, record: Record) -> Sample:
        """Image and merged masks of one record; None for a normal image."""
        folder = self.folder / record.columns["label"]
        image = read_image(folder / f"{record.id}.png", self.loading.channels)
        resized = resize_image(image, self.loading.size)
        if record.label == 0:
            return Sample(resized, None)
        masks = [(path, read_mask(path)) for path in sorted(folder.glob(f"{record.id}_mask*.png"))]
        if not masks:
            raise ValueError(f"Image {folder / record.id}.png needs a mask {record.id}_mask.png.")
        for path, mask in masks:
            if mask.shape != image.shape[1:]:
                raise ValueError(
                    f"Mask {path} must have its image's size {tuple(image.shape[1:])}, but has "
                    f"{tuple(mask.shape)}; restore the file from the download."
                )
        merged = torch.stack([mask for _, mask in masks]).any(0)
        return Sample(resized, resize_mask(merged, self.loading.size))

    def _record(self, name: str, group: str, split: Literal["train", "val", "test"]) -> Record:
        label = name.split()[0]
        path = self.folder / label / f"{name}.png"
        if not path.is_file():
            raise ValueError(f"Image {path} is missing; unpack the download of BUSI there.")
        known = label if label in self.class_names else "lesion"
        columns = {"label": label, "dup_group": group}
        return Record(name, self.class_names.index(known), split, group, columns)
