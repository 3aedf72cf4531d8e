"""Images in tar shards of WebDataset's form, read where they lie."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from datamodules.base import Augmentation, ImageDataModule, Loading, Record, Sample, data_root
from datamodules.images import read_image, read_mask, resize_image, resize_mask

IMAGES = {"png", "jpg", "jpeg", "tif", "tiff", "dcm", "dicom"}
SPLITS = {"", "train", "val", "test"}
OWN = {"label", "split", "group"}


class Member(NamedTuple):
    """A file inside a shard: where its bytes lie."""

    shard: Path
    name: str
    offset: int
    size: int

    def content(self) -> bytes:
        """The bytes; nothing else of the shard is read."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Shards(ImageDataModule):
    """Images of uncompressed tar files, whose members are read one by one at any place.

    Members of one name up to the first dot of its last part are a sample, and the name is its id:
    an image (``.png``, ``.jpg``, ``.tif``, ``.dcm``), ``.json`` with ``label`` and, where they are
    known, ``split`` (train, val or test) and ``group``, and ``.mask.png``, non-zero inside the
    evidence. Further entries of the JSON go into the batch as text. The list of all samples is kept
    in memory, the images too unless ``loading.in_memory`` is false.

    Args:
        shards: Pattern of the tar files, relative to the data root: "archive/*.tar".
        classes: Labels in the order of the classes, the first one without evidence.
        loading: Size, channels, batch size and workers.
        augmentation: Of training batches; None is off.
        seed: Of the order of training images and of the splits that the shards leave open.
        fold: Test fold of a cross-validation, instead of the shards' splits.
        folds: Number of folds.

    Raises:
        ValueError: If there is no shard, or a sample breaks a rule.

    Source of the form: https://github.com/webdataset/webdataset
    """

    def __init__(
        self,
        shards: str,
        classes: list[str],
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.pattern, self.class_names = data_root() / shards, tuple(classes)

    @cached_property
    def members(self) -> dict[str, dict[str, Member]]:
        """Of every sample: its files by the ending of their names."""
        paths = sorted(map(Path, glob(str(self.pattern))))
        if not paths:
            raise ValueError(
                f"No shard is at {self.pattern}; set SIMADV_DATA to the data folder, and shards to "
                "a pattern in it."
            )
        members: dict[str, dict[str, Member]] = {}
        for member in (member for path in paths for member in members_of(path)):
            folder, slash, name = member.name.rpartition("/")
            first, _, ending = name.partition(".")
            files = members.setdefault(folder + slash + first, {})
            if ending.lower() in files:
                raise ValueError(f"Shard {member.shard}: {member.name} is there twice; keep one.")
            files[ending.lower()] = member
        return members

    def records(self) -> list[Record]:
        """Every sample, in the order of the shards."""
        return [self._record(name, files) for name, files in self.members.items()]

    def read(self, record: Record) -> Sample:
        """Image and mask of a sample."""
        files, size = self.members[record.id], self.loading.size
        image = files[image_ending(files)]
        pixels = read_image(
            image.shard / image.name, self.loading.channels, content=image.content()
        )
        mask = None
        if drawn := files.get("mask.png"):
            whole = read_mask(drawn.shard / drawn.name, drawn.content())
            if whole.shape != pixels.shape[1:]:
                raise ValueError(
                    f"Shard {drawn.shard}: mask {drawn.name} must have the image's size "
                    f"{tuple(pixels.shape[1:])}, but has {tuple(whole.shape)}."
                )
            mask = resize_mask(whole, size)
        return Sample(resize_image(pixels, size), mask)

    def _record(self, name: str, files: Mapping[str, Member]) -> Record:
        place = f"Shard {next(iter(files.values())).shard}, sample {name!r}"
        image_ending(files, place)
        if "json" not in files:
            raise ValueError(f"{place}: there is no {name}.json, which tells its label.")
        try:
            facts = dict[str, Any](json.loads(files["json"].content()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}: {name}.json must hold a JSON object: {error}.") from error
        label, split = facts.get("label"), facts.get("split") or ""
        if label not in self.class_names:
            known = ", ".join(self.class_names)
            raise ValueError(f"{place}: label {label!r} is unknown; the known ones are {known}.")
        if split not in SPLITS:
            raise ValueError(
                f"{place}: split must be train, val, test or empty, but got {split!r}."
            )
        return Record(
            id=name,
            label=self.class_names.index(label),
            split=cast("Literal['', 'train', 'val', 'test']", split),
            group=str(facts.get("group") or ""),
            columns={key: str(value) for key, value in facts.items() if key not in OWN},
        )


def members_of(path: Path) -> Iterator[Member]:
    """Every file of a shard; only the headers are read.

    Raises:
        ValueError: If it was cut off, which tarfile does not tell.
    """
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        if file.read() != bytes(1024):
            raise ValueError(f"Shard {path} has no end mark, as one that was cut off; get it anew.")
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            if info.isreg():
                yield Member(path, info.name, info.offset_data, info.size)


def image_ending(files: Mapping[str, Member], place: str = "") -> str:
    """The ending of a sample's image."""
    found = next((ending for ending in files if ending in IMAGES), None)
    if found is None:
        raise ValueError(f"{place}: there is no image, only {', '.join(files)}.")
    return found
