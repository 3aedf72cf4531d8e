"""Annotations in COCO's JSON format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from datamodules.images import Box, boxes_to_mask, resize_mask

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
        content = json.loads(table.read_bytes())
        names = {entry["id"]: str(entry["name"]) for entry in _entries(content, "categories")}
        found: dict[Any, list[dict[str, Any]]] = {}
        for entry in _entries(content, "images"):
            found[entry["id"]] = []
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
            yield f"Table {table}, image {k}", {"label": label, **cells, **own}
    except KeyError as error:
        raise ValueError(
            f"Table {table}: COCO's entry {error} is missing; add it or export the file anew."
        ) from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"Table {table} is not in COCO's format: {str(error)[:300]}; export it anew."
        ) from error


def _entries(content: Any, kind: str) -> list[Mapping[str, Any]]:
    """Images or categories, whose ids must differ and which must have a name."""
    entries: list[Mapping[str, Any]] = content[kind]
    ids: set[object] = set()
    for k, entry in enumerate(entries):
        for name in ("id", "file_name" if kind == "images" else "name"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), int | str):
                raise ValueError(f"{kind} {k} needs a number or text as {name!r}")
        if entry["id"] in ids:
            raise ValueError(f"{kind} {k} has the id {entry['id']!r} of another one")
        ids.add(entry["id"])
    return entries


def as_box(cell: object) -> Box:
    """Four numbers of a JSON file.

    Raises:
        ValueError: If it is something else.
    """
    numbers = isinstance(cell, list) and all(type(number) in {int, float} for number in cell)
    if not isinstance(cell, list) or not numbers or len(cell) != 4:
        raise ValueError(f"a box must be four numbers, but got {str(cell)[:80]!r}.")
    first, second, third, fourth = map(float, cell)
    return first, second, third, fourth


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
        ValueError: If there is neither, one is malformed or for another size, or a corner or box
            lies more than a pixel (which tools round) outside the image.
    """
    shape = annotation.get("segmentation")
    if shape:
        draw = _runs if isinstance(shape, dict) else _polygons
        whole = draw(shape, height, width)
        return resize_mask(torch.from_numpy(whole), size)
    if "bbox" not in annotation:
        raise ValueError("an annotation needs a segmentation or a bbox.")
    x, y, wide, high = as_box(annotation["bbox"])
    box = (x, y, x + wide, y + high)
    if not (wide > 0 and high > 0 and _inside(box, height, width)):
        raise ValueError(
            f"bbox {annotation['bbox']} must lie inside the image, which is {width} pixels wide "
            f"and {height} high."
        )
    return boxes_to_mask([box], height, width, size)


def _inside(corners: Sequence[float], height: int, width: int) -> bool:
    """Whether x, y, x, y ... lie in the image or at most a pixel beside it; NaN does not."""
    return all(-1 <= number <= (height if k % 2 else width) + 1 for k, number in enumerate(corners))


def _polygons(shape: object, height: int, width: int) -> NDArray[np.bool_]:
    """Union of polygons; what pycocotools gets is checked, as others end the process."""
    if not isinstance(shape, list):
        raise ValueError(f"a segmentation must be polygons or runs, but got {str(shape)[:80]!r}.")
    for polygon in shape:
        numbers = isinstance(polygon, list) and all(type(n) in {int, float} for n in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must be x, y, x, y ..., but got {str(polygon)[:80]!r}.")
        if not _inside(polygon, height, width):
            raise ValueError(
                f"polygon {str(polygon)[:80]} must lie inside the image, which is {width} pixels "
                f"wide and {height} high."
            )
    filled: NDArray[np.uint8] = coco.decode(coco.merge(coco.frPyObjects(shape, height, width)))
    return filled.astype(bool)


def _runs(shape: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """Mask of run lengths by columns, outside first; compressed (text) or not (list)."""
    if shape.get("size") != [height, width]:
        size = shape.get("size")
        told = f"{size[0]} x {size[1]}" if isinstance(size, list) and len(size) == 2 else size
        raise ValueError(
            f"its segmentation is for {told} pixels, but the image has {height} x {width}."
        )
    counts = shape.get("counts")
    runs = decompressed(counts) if isinstance(counts, str) else counts
    good = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not isinstance(runs, list) or not good or sum(runs) != height * width:
        raise ValueError(f"runs must add up to {height} x {width}, but got {str(counts)[:80]!r}.")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def decompressed(text: str) -> list[int]:
    """COCO's compressed run lengths: digits of five bits, the low ones first, in letters from "0".

    From the fourth on a run is told by its difference to the one before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        value -= (1 << shift) if digit & 16 else 0  # a negative number
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
