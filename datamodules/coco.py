"""Annotations in COCO's JSON format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from pycocotools import mask as coco
from torch import Tensor

from datamodules.images import boxes_to_mask, resize_mask

NONE = "none"  # label of an image without annotations


def coco_lines(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells of every image of a COCO file, as the rows of a table.

    The cells are ``image`` (its file name), ``label`` (the names of its categories, sorted, joined
    by " + ", or "none"), ``annotations`` (JSON: category, bbox, segmentation of each), ``id`` and
    the image's further entries.

    Raises:
        ValueError: If the file is no COCO file, or an annotation names no image or category.
    """
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        found: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
        for k, annotation in enumerate(content["annotations"]):
            image, category = annotation["image_id"], annotation["category_id"]
            if image not in found or category not in names:
                raise ValueError(
                    f"annotation {k} names image {image!r} and category {category!r}, and one of "
                    "them is not listed"
                )
            kept = {key: annotation[key] for key in ("bbox", "segmentation") if key in annotation}
            found[image].append({"category": names[category], **kept})
        for k, entry in enumerate(content["images"]):
            annotations = found[entry["id"]]
            label = " + ".join(sorted({each["category"] for each in annotations})) or NONE
            cells = {name: str(value) for name, value in entry.items() if name != "file_name"}
            own = {"image": str(entry["file_name"]), "annotations": json.dumps(annotations)}
            yield f"{table}, image {k}", {"label": label, **cells, **own}
    except KeyError as error:
        raise ValueError(f"Table {table}: COCO's entry {error} is missing.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"Table {table} is not in COCO's format: {error}.") from error


def annotation_mask(
    annotation: Mapping[str, Any], height: int, width: int, size: int
) -> Bool[Tensor, "size size"]:
    """Mask of one annotation on a square of ``size`` pixels: its segmentation, else its box.

    Args:
        annotation: segmentation (polygons or run lengths, compressed or not) or bbox (x, y, width,
            height), in pixels of the image.
        height: Of the image.
        width: Of the image.
        size: Side of the square.

    Raises:
        ValueError: If there is neither, or run lengths are for another size.
    """
    shape = annotation.get("segmentation")
    if shape:
        if isinstance(shape, dict) and [*shape["size"]] != [height, width]:
            raise ValueError(
                f"its segmentation is for {shape['size'][0]} x {shape['size'][1]} pixels, but the "
                f"image has {height} x {width}"
            )
        coded = shape
        if isinstance(shape, list) or isinstance(shape["counts"], list):
            coded = coco.frPyObjects(shape, height, width)
        whole = coco.merge(coded) if isinstance(coded, list) else coded
        return resize_mask(torch.from_numpy(coco.decode(whole)).bool(), size)
    if "bbox" not in annotation:
        raise ValueError("an annotation needs a segmentation or a bbox")
    x, y, wide, high = annotation["bbox"]
    return boxes_to_mask([(x, y, x + wide, y + high)], height, width, size)
