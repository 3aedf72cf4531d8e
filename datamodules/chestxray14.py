"""NIH ChestX-ray14: chest X-rays with findings from reports, some of them with boxes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from datamodules.base import Augmentation, Loading, Record, Sample, Split, split_by_seed
from datamodules.decoded import Decoded, needed_csv
from datamodules.images import Box

BOXED = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)  # findings that have boxes; the box table writes "Infiltrate"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")


class ChestXray14(Decoded):
    """112,120 frontal chest X-rays of 30,805 patients; 984 boxes in 880 images of the test list.

    The folder holds the download: ``Data_Entry_2017_v2020.csv`` (or ``Data_Entry_2017.csv``),
    ``BBox_List_2017.csv``, ``train_val_list.txt``, ``test_list.txt`` and the images in ``images``
    or ``images_001/images`` and so on. Images without any of the findings are left out, except
    those of "No Finding". Patients never part. Columns: finding, patient, age, sex, view. A box of
    another finding than the chosen ones is no evidence.

    Args:
        folder: Of the download, relative to the data root.
        findings: Any of them makes an image positive; those of `BOXED` have masks of their own.
        split: "official" is the published one, a tenth of its training patients for validation,
            none of them with boxes; "boxes" the same, but half of the patients with boxes are for
            validation, so that settings can be chosen on boxes; "seeded" is drawn.
        cache: Folder of the decoded images, relative to the data root; None is ``cache`` in
            ``folder``.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of what is drawn.
        fold: Test fold of a cross-validation, instead of the split.
        folds: Number of folds.

    Raises:
        ValueError: If a file is missing, or there is no such finding.

    Source: Wang et al., ChestX-ray8, CVPR 2017.
    """

    class_names = ("no finding", "finding")

    def __init__(
        self,
        folder: str = "chestxray14",
        findings: tuple[str, ...] = BOXED,
        split: Literal["official", "boxes", "seeded"] = "official",
        cache: str | None = None,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(folder, cache, loading, augmentation, seed, fold, folds)
        self.findings, self.split = findings, split
        self.feature_names = tuple(name for name in findings if name in BOXED)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Chosen images by id: the further columns, and label."""
        path = next((p for name in TABLES if (p := self.folder / name).is_file()), None)
        names = {
            "Image Index": "id",
            "Finding Labels": "finding",
            "Patient ID": "patient",
            "Patient Age": "age",
            "View Position": "view",
        }
        table = needed_csv(path or self.folder / TABLES[0], list(names))
        sex = "Patient Gender" if "Patient Gender" in table else "Patient Sex"
        table = table.rename(columns=names | {sex: "sex"}).astype(str).set_index("id")
        found = table["finding"].str.split("|")
        if unknown := sorted(set(self.findings) - set(found.explode())):
            raise ValueError(f"findings name {unknown}, which no image of {path} has.")
        table["label"] = [int(bool(set(self.findings) & set(names))) for names in found]
        chosen = (table["label"] == 1) | (table["finding"] == "No Finding")
        return table.loc[chosen, ["finding", "patient", "age", "sex", "view", "label"]]

    @cached_property
    def boxes(self) -> dict[str, dict[str, list[Box]]]:
        """Boxes by image and finding, pixels of the image."""
        path = self.folder / "BBox_List_2017.csv"
        table = needed_csv(path, ["Image Index", "Finding Label"])  # the others are misnamed
        boxes: dict[str, dict[str, list[Box]]] = {}
        for name, finding, x, y, width, height in table.iloc[:, :6].itertuples(index=False):
            known = "Infiltration" if finding == "Infiltrate" else finding
            if known in self.findings:
                box = (x, y, x + width, y + height)
                boxes.setdefault(name, {}).setdefault(known, []).append(box)
        return boxes

    def records(self) -> list[Record]:
        """Every chosen image, in the order of the table."""
        rows = self.table.reset_index().to_dict("records")
        columns = ["finding", "patient", "age", "sex", "view"]
        records = [
            Record(
                str(row["id"]),
                int(row["label"]),
                group=str(row["patient"]),
                columns={name: str(row[name]) for name in columns},
            )
            for row in rows
        ]
        return records if self.split == "seeded" else self.official(records)

    def official(self, records: list[Record]) -> list[Record]:
        """The records with their split."""
        parts: dict[str, list[Record]] = {"train_val": [], "test": []}
        home: dict[str, str] = {}
        for name in parts:
            path = self.folder / f"{name}_list.txt"
            if not path.is_file():
                raise ValueError(f"List {path} is missing; take it from the download.")
            home |= dict.fromkeys(path.read_text().split(), name)
        for record in records:
            if record.id not in home:
                raise ValueError(f"Image {record.id} is in neither list; set split to 'seeded'.")
            parts[home[record.id]].append(record)
        drawn = split_by_seed(parts["train_val"], self.seed)
        validation = {record.group for record in drawn["val"]}
        if self.split == "boxes":
            boxed = sorted({r.group for r in parts["test"] if r.id in self.boxes})
            validation |= set(boxed[::2])
        tested = {record.id for record in parts["test"]}
        return [placed(record, validation, record.id in tested) for record in records]

    def paths(self) -> dict[str, Path]:
        """File of every chosen image."""
        found = {path.name: path for path in self.folder.glob("images*/**/*.png")}
        return {name: found.get(name, self.folder / "images" / name) for name in self.table.index}

    def read(self, record: Record) -> Sample:
        """Decoded image; the boxes of the chosen findings, None where there are none."""
        return self.boxed(record.id, self.boxes.get(record.id, {}) if record.label else {})


def placed(record: Record, validation: set[str], tested: bool) -> Record:
    """The record in its split: validation by its patient, else test or training."""
    split: Split = "test" if tested else "train"
    return replace(record, split="val" if record.group in validation else split)
