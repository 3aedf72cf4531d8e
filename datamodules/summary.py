"""What is in a data set: ``python -m datamodules.summary -c CONFIG``, or ``--tables FOLDER``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml
from jaxtyping import Bool
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from skimage.measure import label, regionprops
from torch import Tensor

from datamodules.base import SPLITS, ImageDataModule, Split
from datamodules.images import Box, boxes_to_mask
from datamodules.rsna import SIDE, RSNAPneumonia, read_tables


@dataclass(frozen=True)
class Content:
    """Two tables about a data set.

    Attributes:
        images: Columns split, label (name), group, and union: share of the image that the evidence
            covers in percent, NaN where there is none.
        boxes: One box each: columns split, height and width in pixels, and area in percent.
    """

    images: pd.DataFrame
    boxes: pd.DataFrame


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the content of a data set as the command line names it."""
    parser = ArgumentParser(prog="python -m datamodules.summary", description=__doc__)
    parser.add_argument("-c", "--config", type=Path | None, help="YAML of train.py: its key data")
    parser.add_argument("--tables", type=Path | None, help="folder of RSNA's tables, no images")
    parser.add_argument("--size", type=int, default=224, help="image side for --tables, pixels")
    parser.add_subclass_arguments(ImageDataModule, "data", required=False)
    given = parser.parse_args(arguments)
    if given.tables:
        print(report(content_of_tables(given.tables, given.size)))
        return
    if given.config:
        given = parser.parse_object({"data": data_section(given.config)})
    if not given.data:
        parser.error(
            "Name a data set: -c CONFIG with a key data, --data CLASS, or --tables FOLDER."
        )
    data: ImageDataModule = parser.instantiate(given).data
    data.loading = replace(data.loading, on_bad_image="skip")  # they are listed below the tables
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Left out: ")
        print(report(content_of_module(data)))
    if data.skipped:
        total = len(data.skipped) + sum(map(len, data.splits.values()))
        print(f"\n{len(data.skipped)} of {total} images cannot be read:")
        print(*data.skipped.values(), sep="\n")


def data_section(config: Path) -> object:
    """The key ``data`` of a preset: given in place, or as a file's path relative to the preset."""
    data = (yaml.safe_load(config.read_text()) or {}).get("data")
    return yaml.safe_load((config.parent / data).read_text()) if isinstance(data, str) else data


def content_of_module(data: ImageDataModule, splits: Sequence[Split] = SPLITS) -> Content:
    """Read every image of the splits once; boxes: the connected parts of its mask."""
    data.prepare_data()
    data.setup()
    images, boxes, console = [], [], Console(stderr=True)
    for split in splits:
        every = data.dataset(split)
        for index in track(range(len(every)), f"Reading {split}", console=console):
            record, sample = every.item(index)
            mask = sample.mask
            name, group = data.class_names[record.label], record.group or (record.id,)
            images.append({"split": split, "label": name, "group": group, "union": union(mask)})
            if mask is not None:
                boxes += box_rows(split, connected_boxes(mask), len(mask), len(mask))
    return Content(pd.DataFrame(images), box_frame(boxes))


def content_of_tables(folder: Path, size: int) -> Content:
    """Exams of RSNA's split, from its tables alone, as if the images had ``size`` pixels a side."""
    exams = read_tables(folder).query("split != ''")
    masks = [boxes_to_mask(boxes, SIDE, SIDE, size) if boxes else None for boxes in exams["boxes"]]
    images = exams[["split"]].assign(
        label=exams["label"].map(dict(enumerate(RSNAPneumonia.class_names))),
        group=exams["id"],
        union=[union(mask) for mask in masks],
    )
    pairs = zip(exams["split"], exams["boxes"], strict=True)
    boxes = [row for split, found in pairs for row in box_rows(split, found, SIDE, size)]
    return Content(images, box_frame(boxes))


def union(mask: Bool[Tensor, "h w"] | None) -> float:
    """Share of the image inside the mask, percent; NaN where there is nothing."""
    return float("nan") if mask is None or not mask.any() else 100 * float(mask.numpy().mean())


def box_rows(split: str, boxes: Sequence[Box], side: int, size: int) -> list[dict[str, object]]:
    """Rows of ``Content.boxes``: boxes of an image of ``side`` pixels, resized to ``size``."""
    sides = [((y1 - y0) / side, (x1 - x0) / side) for x0, y0, x1, y1 in boxes]
    return [
        {"split": split, "height": size * h, "width": size * w, "area": 100 * h * w}
        for h, w in sides
    ]


def box_frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Rows of boxes as a table that has its columns even when it is empty."""
    return pd.DataFrame(rows, columns=["split", "height", "width", "area"])


def connected_boxes(mask: Bool[Tensor, "h w"]) -> list[Box]:
    """Half-open (x0, y0, x1, y1) around each connected part; pixels touch at corners too."""
    labels = label(mask.numpy(), connectivity=2)
    parts = regionprops(labels)
    return [(x0, y0, x1, y1) for y0, x0, y1, x1 in (part.bbox for part in parts)]


def counts(images: pd.DataFrame) -> pd.DataFrame:
    """Images, groups, share with a mask in percent, and images of each label, one row a split."""
    by_split = images.groupby("split", sort=False)
    table = pd.DataFrame({"images": by_split.size(), "groups": by_split["group"].nunique()})
    table["with mask %"] = 100 * by_split["union"].count() / table["images"]
    return table.join(pd.crosstab(images["split"], images["label"])).loc[list(SPLITS)]


def sizes(content: Content) -> pd.DataFrame:
    """Count, min, max, mean and median of box sides, box areas and union covers in each split."""
    boxes = content.boxes.melt("split", var_name="size")
    cover = content.images.melt("split", ["union"], var_name="size")
    both = pd.concat([boxes.astype({"value": float}), cover])
    table = both.groupby(["split", "size"])["value"].agg(["count", "min", "max", "mean", "median"])
    rows = [(split, size) for split in SPLITS for size in ("height", "width", "area", "union")]
    return table.reindex(pd.MultiIndex.from_tuples(rows, names=["split", "size"]))


def report(content: Content) -> str:
    """Both tables as text."""
    note = "Boxes: height and width in px, area in % of the image; union: all evidence, %."
    tables = [counts(content.images).round(1), sizes(content).round(2)]
    return "\n\n".join([tables[0].to_string(), note, tables[1].to_string()])


if __name__ == "__main__":
    main()
