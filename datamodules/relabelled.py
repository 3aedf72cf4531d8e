"""Any data set with training labels that say nothing, for sanity checks of explanations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datamodules.base import ImageDataModule, Record, Sample, Split


class Relabelled(ImageDataModule):
    """Another data module whose training labels are shuffled; validation and test stay.

    Images are not augmented, so that a network can learn the labels by heart.

    Args:
        data: The data module itself.
        share: Of the training images whose labels are shuffled among each other, in (0, 1].
        seed: Of the choice and of the shuffling.

    Raises:
        ValueError: If ``share`` is outside (0, 1].

    Source: Adebayo et al. 2018, Arun et al. 2021: label randomisation.
    """

    def __init__(self, data: ImageDataModule, share: float = 1.0, seed: int = 0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share of shuffled labels must be in (0, 1], but got {share}.")
        super().__init__(data.loading, None, data.seed, data.fold, data.folds)
        self.data, self.share, self.label_seed = data, share, seed
        self.class_names = data.class_names
        self.originals: dict[str, Record] = {}

    def prepare_data(self) -> None:
        """What the data set itself does."""
        self.data.prepare_data()

    def records(self) -> list[Record]:
        """Every image of the data set."""
        return self.data.records()

    def draw(self, records: Sequence[Record]) -> dict[Split, list[Record]]:
        """Its splits, with shuffled labels in the training split."""
        self.originals = {record.id: record for record in records}
        splits = self.data.draw(records)
        return {**splits, "train": shuffled(splits["train"], self.share, self.label_seed)}

    def bad_images(self, records: Sequence[Record]) -> dict[str, str]:
        """Those of the data set."""
        return self.data.bad_images([self.originals[record.id] for record in records])

    def read(self, record: Record) -> Sample:
        """The image as it is."""
        return self.data.read(self.originals[record.id])


def shuffled(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """The records with the labels of a share of them, drawn by the seed, shuffled."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(records))[: round(share * len(records))]
    labels = [record.label for record in records]
    for place, source in zip(chosen, generator.permutation(chosen), strict=True):
        labels[place] = records[source].label
    return [replace(record, label=label) for record, label in zip(records, labels, strict=True)]
