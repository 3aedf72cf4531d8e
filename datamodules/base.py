"""What every data module gives: typed batches of images, labels and masks, in seeded splits."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, Real, UInt8, UInt16
from kornia.augmentation import (
    AugmentationSequential,
    RandomAffine,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.images import BadImage

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def data_root() -> Path:
    """Folder of all data sets: the environment variable SIMADV_DATA, "data" where it is unset."""
    return Path(os.environ.get("SIMADV_DATA", "data"))


class Batch(TypedDict):
    """A batch of images with their annotation.

    image: Float (b, c, h, w) in [0, 1], c is 1 or 3.
    label: Int64 (b,), index into the data module's ``class_names``.
    mask: Bool (b, h, w), True inside the evidence (union of all lesions); all False where unknown.
    has_mask: Bool (b,), whether an annotation with at least one pixel exists.
    features: Bool (b, k, h, w), one mask for each of the data module's ``feature_names``; k may be
        0, and a feature that an image lacks is all False.
    importance: Int8 (b, h, w), level of each pixel's region (3 the most relevant .. -1); 0 where
        the data set has none.
    id: The data set's own name of each image.
    columns: Further columns of the table, as text; a column that a row lacks is "".
    """

    image: Tensor
    label: Tensor
    mask: Tensor
    has_mask: Tensor
    features: Tensor
    importance: Tensor
    id: list[str]
    columns: dict[str, list[str]]


@dataclass(frozen=True)
class Record:
    """One image of a data set before it is read.

    Attributes:
        id: Unique in the data set.
        label: Index into ``class_names``.
        split: Where the table puts it, or "" to be drawn from the seed.
        group: Images of one group (patient, board) never part; "" is a group of its own.
        columns: Further columns of the table.
    """

    id: str
    label: int
    split: Literal["", "train", "val", "test"] = ""
    group: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One image as read.

    Attributes:
        image: Values in [0, 1], or integers of 8 or 16 bit that `unpack` brings there.
        mask: Its evidence, the union of all; None if it is not annotated.
        features: Masks by name, where the data set tells several kinds of evidence apart.
        importance: Level of each pixel's region, where the data set has levels.
    """

    image: Real[Tensor, "c h w"]
    mask: Bool[Tensor, "h w"] | None
    features: Mapping[str, Bool[Tensor, "h w"]] = field(default_factory=dict)
    importance: Int8[Tensor, "h w"] | None = None


@dataclass(frozen=True)
class Loading:
    """How images are brought to the device.

    Attributes:
        size: Side of the square that every image is resized to, pixels.
        channels: 1 reads grey, 3 reads RGB.
        batch_size: Images per step and process.
        workers: Worker processes of each loader.
        bits: Of the values that a data set which is decoded once (RSNAPneumonia) keeps: 8 or 16.
        in_memory: Keep every image in memory after its first reading, one byte a value where its
            values are multiples of 1/255, else two, which rounds them to 1/65535. Every process
            and every worker keeps what it has read itself.
        on_bad_image: A file that cannot be read is an error where it is met, or "skip": all images
            are read once by ``setup`` (decoded once by ``prepare_data``), each bad file is told by
            name, and its image is left out; the others stay in their splits.
    """

    size: int = 224
    channels: Literal[1, 3] = 1
    batch_size: int = 32
    workers: int = 0
    bits: Literal[8, 16] = 8
    in_memory: bool = True
    on_bad_image: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Augmentation:
    """Random geometric changes of training images and masks, drawn per image on the device.

    Attributes:
        rotation: Largest angle, degrees.
        translation: Largest shift, share of the image side.
        zoom: Largest change of scale: 0.1 draws from [0.9, 1.1].
        horizontal_flip: Probability.
        vertical_flip: Probability.
    """

    rotation: float = 10.0
    translation: float = 0.05
    zoom: float = 0.1
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0

    def build(self) -> AugmentationSequential:
        """Kornia's augmentation, one draw for an image and its mask."""
        return AugmentationSequential(
            RandomAffine(
                degrees=self.rotation,
                translate=(self.translation, self.translation),
                scale=(1 - self.zoom, 1 + self.zoom),
                padding_mode="border",
                p=1.0,
            ),
            RandomHorizontalFlip(p=self.horizontal_flip),
            RandomVerticalFlip(p=self.vertical_flip),
            data_keys=["input", "mask"],
        )


class EvenBatches(DistributedSampler[list[int]]):
    """Batches of indices for evaluation: every image once, and as many batches on every process.

    A padded sampler counts images twice; one of unequal length leaves processes waiting at a
    collective call. Here the images are cut into ``rounds x processes`` nearly equal batches,
    none of them empty. A batch holds ``batch_size`` images at most, except that one of 1 may
    become 2 under several processes. Use it as ``sampler`` with ``batch_size=None``.

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(self, images: int, batch_size: int, processes: int = 1, rank: int = 0) -> None:
        if images < processes:
            raise ValueError(
                f"Every process needs an image, but {processes} processes share {images} image(s): "
                "use fewer devices."
            )
        dataset = cast("Dataset[list[int]]", range(images))  # only its length is used
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)
        self.images, self.processes = images, processes
        self.rounds = min(-(-images // (batch_size * processes)), images // processes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches."""
        parts = np.array_split(np.arange(self.images), self.rounds * self.processes)
        return iter([part.tolist() for part in parts[self.rank :: self.processes]])

    def __len__(self) -> int:
        """Batches of each process."""
        return self.rounds


Item = tuple[Record, Sample]


class TrainingOrder(DistributedSampler[Item | list[Item]]):
    """Training images in the order of the seed and the epoch.

    Attributes:
        start: How many to leave out, once, because a training that stopped has seen them.
        ratio: Abnormal images for each normal one; 0 takes each image once.
        turns: How often an epoch goes through the images, each time in another order.
    """

    start = ratio = 0
    turns = 1
    abnormal: Sequence[int] = ()
    normal: Sequence[int] = ()

    def balance(self, labels: Sequence[int], ratio: int) -> None:
        """Give ``ratio`` abnormal images (not of class 0) for each normal one, if there are fewer.

        Each kind comes in turn, over the epochs; an epoch stays as long.
        """
        self.abnormal = [k for k, label in enumerate(labels) if label]
        self.normal = [k for k, label in enumerate(labels) if not label]
        self.ratio = ratio if 0 < len(self.abnormal) < ratio * len(self.normal) else 0

    def __iter__(self) -> Iterator[Item | list[Item]]:
        """Yield the indices of this process."""
        start, self.start = self.start, 0
        first = self.epoch * self.turns
        turns = chain.from_iterable(self.turn(first + k) for k in range(self.turns))
        return islice(turns, start, None)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Images of an epoch of this process."""
        return super().__len__() * self.turns

    def turn(self, number: int) -> list[int]:
        """Indices of this process when the images are gone through for the ``number``-th time."""
        epoch, self.epoch = self.epoch, number
        places: Any = super().__iter__()
        self.epoch = epoch
        if not self.ratio:
            return list(places)
        first = number * len(cast("Images", self.dataset))
        return [self.balanced(first + place) for place in places]

    def balanced(self, place: int) -> int:
        """Index at a place in an endless row of ``ratio`` abnormal images and a normal one."""
        row, k = divmod(place, self.ratio + 1)
        if k == self.ratio:
            return self.normal[row % len(self.normal)]
        return self.abnormal[(row * self.ratio + k) % len(self.abnormal)]


class TrainingLoader(DataLoader[Item | list[Item]]):
    """Batches that go on where a training stopped: Lightning keeps their count in its checkpoints.

    The workers begin when the first batch is asked for: the sampler knows its epoch then.
    """

    sampler: TrainingOrder
    seen = given = 0  # batches left out at the next start; batches given since the last

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # of what collate makes
        """Yield the batches of an epoch, of the first one after a stop those that are left."""
        seen, self.seen = self.seen, 0
        return self.batches(seen)

    def batches(self, seen: int) -> Iterator[Batch]:
        """Yield the batches after the first ``seen``."""
        assert self.batch_size is not None
        self.sampler.start, self.given = seen * self.batch_size, seen
        for batch in super().__iter__():
            self.given += 1
            yield cast("Batch", batch)

    def state_dict(self) -> dict[str, int]:
        """How many batches the epoch gave."""
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leave out the batches that were given, in the first epoch."""
        self.seen = state["given"]


class Images(Dataset[Item | list[Item]]):
    """Reads records, one by index or several by a list of indices.

    Args:
        records: The images of one split.
        read: Reads one of them.
        kept: Samples by id with packed images, filled as they are read; None keeps nothing.
    """

    def __init__(
        self,
        records: Sequence[Record],
        read: Callable[[Record], Sample],
        kept: dict[str, Sample] | None = None,
    ) -> None:
        self.records, self.read, self.kept = records, read, kept

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.records)

    def __getitem__(self, index: int | list[int]) -> Item | list[Item]:
        """One image, or a list of them for a list of indices."""
        return self.item(index) if isinstance(index, int) else [self.item(i) for i in index]

    def item(self, index: int) -> Item:
        """One image, from memory where it is kept; the first reading gives the same values."""
        record = self.records[index]
        if self.kept is None:
            return record, self.read(record)
        if record.id not in self.kept:
            sample = self.read(record)
            self.kept[record.id] = replace(sample, image=pack(sample.image))
        return record, self.kept[record.id]


class Reasons(Dataset[str]):
    """What keeps each image from being read; "" where nothing does."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        """Read one image."""
        try:
            self.images.item(index)
        except BadImage as error:
            return str(error)
        return ""


def pack(image: Real[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"] | UInt16[Tensor, "c h w"]:
    """Image in [0, 1] as bytes where no value moves by more than 1e-6, else as 16-bit integers."""
    if not image.is_floating_point():
        return image
    byte = (image * 255).round()
    if bool(((byte / 255 - image).abs() <= 1e-6).all()):
        return byte.to(torch.uint8)
    return (image * 65535).round().to(torch.uint16)


def unpack(packed: Real[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Undo ``pack``; what is not packed stays as it is."""
    if packed.is_floating_point():
        return packed
    return packed.float().div_(255 if packed.dtype == torch.uint8 else 65535)


def stacked(images: Sequence[Real[Tensor, "c h w"]]) -> Float[Tensor, "b c h w"]:
    """Images, packed or not, as a batch of values in [0, 1]."""
    if len({image.dtype for image in images}) == 1:
        return unpack(torch.stack(list(images)))  # at once, which is several times faster
    return torch.stack([unpack(image) for image in images])


def collate(items: Sequence[Item], feature_names: Sequence[str] = ()) -> Batch:
    """Stack images read at one size into a batch; a missing mask is all False."""
    records, samples = [item[0] for item in items], [item[1] for item in items]
    blank = torch.zeros(samples[0].image.shape[-2:], dtype=torch.bool)
    level = blank.to(torch.int8)
    mask = torch.stack([blank if sample.mask is None else sample.mask for sample in samples])
    each = [[sample.features.get(name, blank) for name in feature_names] for sample in samples]
    features = [torch.stack(masks) if masks else blank[None][:0] for masks in each]
    levels = [level if sample.importance is None else sample.importance for sample in samples]
    names = dict.fromkeys(name for record in records for name in record.columns)
    return Batch(
        image=stacked([sample.image for sample in samples]),
        label=torch.tensor([record.label for record in records]),
        mask=mask,
        has_mask=mask.flatten(1).any(1),
        features=torch.stack(features),
        importance=torch.stack(levels),
        id=[record.id for record in records],
        columns={name: [record.columns.get(name, "") for record in records] for name in names},
    )


def split_by_table(records: Sequence[Record]) -> dict[Split, list[Record]]:
    """Records of each split where the data set names them.

    Raises:
        ValueError: If a group has images in two splits.
    """
    home: dict[str, str] = {}
    for record in records:
        if record.group and home.setdefault(record.group, record.split) != record.split:
            raise ValueError(
                f"A group must lie in one split, but {record.group!r} has images in "
                f"{home[record.group]!r} and {record.split!r} (image {record.id!r})."
            )
    return {split: [record for record in records if record.split == split] for split in SPLITS}


def split_by_seed(
    records: Sequence[Record], seed: int, folds: int = 10, fold: int = 0
) -> dict[Split, list[Record]]:
    """Draw splits: ``fold`` is the test set, the next one validation, the rest training.

    Folds are stratified by label, and images of one group stay together.

    Raises:
        ValueError: If there are too few images or groups for so many folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    owners = [(record.group, "" if record.group else record.id) for record in records]
    number = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    if len(number) < folds:
        raise ValueError(
            f"{folds} folds need as many groups, but the data set has {len(number)} "
            f"in {len(records)} image(s)."
        )
    labels = np.array([record.label for record in records])
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = kfold.split(labels, labels, [number[owner] for owner in owners])
    place = np.empty(len(records), dtype=int)
    for i, (_, test) in enumerate(parts):
        place[test] = (i - fold) % folds
    names: dict[int, Split] = {0: "test", 1: "val"}
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for record, i in zip(records, place.tolist(), strict=True):
        splits[names.get(i, "train")].append(record)
    return splits


def processes() -> tuple[int, int]:
    """Number of processes and the rank of this one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


def gathered(mine: dict[str, str]) -> dict[str, str]:
    """What all processes have found, the same on each."""
    count, _ = processes()
    parts = [mine] * count
    if count > 1:
        distributed.all_gather_object(parts, mine)
    return {name: text for part in parts for name, text in part.items()}


class ImageDataModule(LightningDataModule, ABC):
    """Splits, loaders and augmentation; a subclass lists its records and reads one of them.

    Args:
        loading: Size, channels, batch size and workers.
        augmentation: Geometric augmentation of training batches; None is off.
        seed: Of the order of training images and of the splits that the data set leaves open.
        fold: Test fold in 0 .. folds - 1 for cross-validation (validation is the next fold, every
            split of the table is ignored); None uses the table's split, or draws 80/10/10 %.
        folds: Number of folds, 3 or more.

    Attributes:
        class_names: Names of the labels. Label 0 is the normal class; images of every other label
            carry evidence, which a mask may outline.
        feature_names: Kinds of evidence that have masks of their own; none by default.
        splits: Records of each split, from ``setup`` on.
        skipped: Why images were left out, by id; see ``Loading.on_bad_image``.

    Raises:
        ValueError: If ``fold`` is outside 0 .. folds - 1, or ``folds`` below 3.
    """

    class_names: tuple[str, ...]
    feature_names: tuple[str, ...] = ()

    def __init__(
        self,
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__()
        if folds < 3:
            raise ValueError(f"folds must be 3 or more (test, val, train), but got {folds}.")
        if fold is not None and not 0 <= fold < folds:
            raise ValueError(f"fold must be in 0 .. {folds - 1}, but got {fold}.")
        self.loading = loading or Loading()
        self.augment = augmentation.build() if augmentation else None
        self.seed, self.fold, self.folds = seed, fold, folds
        self.splits: dict[Split, list[Record]] = {}
        self.skipped: dict[str, str] = {}
        self.kept: dict[str, Sample] | None = {} if self.loading.in_memory else None

    @abstractmethod
    def records(self) -> list[Record]:
        """Every image of the data set, in a fixed order, each id once."""

    @abstractmethod
    def read(self, record: Record) -> Sample:
        """Read one image and its evidence at ``loading.size`` with ``loading.channels``."""

    def setup(self, stage: str | None = None) -> None:
        """List the records of every split, once, whatever the stage.

        Raises:
            ValueError: If an id comes twice, only some images name their split, a group lies in
                two splits, or a split is empty.
        """
        if not self.splits:
            splits = self.divide(self.records())
            self.splits = self.readable(splits) if self.loading.on_bad_image == "skip" else splits

    def divide(self, records: Sequence[Record]) -> dict[Split, list[Record]]:
        """Records of each split, by the table or by the seed, checked."""
        for name, count in Counter(record.id for record in records).items():
            if count > 1:
                raise ValueError(f"Image ids must be unique, but {name!r} comes {count} times.")
        return self.filled(self.draw(records))

    def filled(self, splits: dict[Split, list[Record]]) -> dict[Split, list[Record]]:
        """The splits, none of which is empty."""
        for split, members in splits.items():
            if not members:
                raise ValueError(
                    f"Every split needs an image, but {split!r} of {type(self).__name__} "
                    f"({sum(map(len, splits.values()))} images in all) is empty."
                )
        return splits

    def readable(self, splits: dict[Split, list[Record]]) -> dict[Split, list[Record]]:
        """The splits without images that cannot be read; each is told once.

        They are the same on every process, as processes of unequal batches wait for each other.
        """
        every = [record for members in splits.values() for record in members]
        self.skipped = self.bad_images(every)
        if processes()[1] == 0:
            for reason in self.skipped.values():
                warnings.warn(f"Left out: {reason}", stacklevel=3)
        return self.filled(
            {
                split: [record for record in members if record.id not in self.skipped]
                for split, members in splits.items()
            }
        )

    def bad_images(self, records: Sequence[Record]) -> dict[str, str]:
        """Why images cannot be read, by id; all are read, shared by the processes."""
        (count, rank), workers = processes(), self.loading.workers
        mine = records[rank::count]
        images = Images(mine, self.read, None if workers else self.kept)
        loader = DataLoader(Reasons(images), None, num_workers=workers)
        console = Console(stderr=True)
        told = track(loader, "Checking images", len(mine), console=console, disable=rank > 0)
        return gathered({r.id: why for r, why in zip(mine, told, strict=True) if why})

    def draw(self, records: Sequence[Record]) -> dict[Split, list[Record]]:
        """Records of each split: by the fold, by the table, or by the seed."""
        if self.fold is not None:
            return split_by_seed(records, self.seed, self.folds, self.fold)
        without = [record for record in records if not record.split]
        if len(without) == len(records):
            return split_by_seed(records, self.seed)
        if without:
            raise ValueError(
                f"All images or none must name their split, but {len(without)} of {len(records)} "
                f"name none (the first is {without[0].id!r})."
            )
        return split_by_table(records)

    def train_dataloader(self) -> DataLoader[Item | list[Item]]:
        """Training images in an order drawn from the seed and the epoch, shared by all processes.

        How often each is in an epoch follows ``epoch_images`` and ``abnormal_per_normal`` of the
        ``optimisation`` of the module that is trained.

        The last, smaller batch is left out: batch norm fails on a single image.
        """
        dataset, (count, rank) = self.dataset("train"), processes()
        sampler = TrainingOrder(dataset, num_replicas=count, rank=rank, seed=self.seed)
        module = getattr(self.trainer, "lightning_module", None)
        optimisation = getattr(module, "optimisation", None)
        ratio = getattr(optimisation, "abnormal_per_normal", None) or 0
        sampler.balance([record.label for record in self.splits["train"]], ratio)
        least = getattr(optimisation, "epoch_images", 0)
        sampler.turns = max(least // len(dataset), 1)
        drop_last = len(sampler) > self.loading.batch_size
        # its own generator: a start draws, and there is one more after a stop
        generator = torch.Generator().manual_seed(self.seed)
        return TrainingLoader(
            dataset,
            self.loading.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            generator=generator,
            **self.settings(),
        )

    def val_dataloader(self) -> DataLoader[Item | list[Item]]:
        """Validation images, each once."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Item | list[Item]]:
        """Test images, each once."""
        return self.loader("test")

    def loader(self, split: Split) -> DataLoader[Item | list[Item]]:
        """Images of any split for evaluation: in order, each once, shared by all processes."""
        dataset = self.dataset(split)
        sampler = EvenBatches(len(dataset), self.loading.batch_size, *processes())
        return DataLoader(dataset, None, sampler=sampler, **self.settings())

    def dataset(self, split: Split) -> Images:
        """Images of a split; calls ``setup`` where that has not been done."""
        self.setup()
        return Images(self.splits[split], self.read, self.kept)

    def settings(self) -> dict[str, Any]:
        """What the loaders of training and evaluation share."""
        return {
            "collate_fn": partial(collate, feature_names=self.feature_names),
            "num_workers": self.loading.workers,
            "persistent_workers": self.loading.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on its device, image, masks and levels by the same draw."""
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        planes = [batch["mask"][:, None], batch["importance"][:, None], batch["features"]]
        image, moved = self.augment(batch["image"], torch.cat([p.float() for p in planes], 1))
        mask = moved[:, 0] > 0.5
        return {
            **batch,
            "image": image,
            "mask": mask,
            "has_mask": mask.flatten(1).any(1),
            "importance": moved[:, 1].round().to(torch.int8),
            "features": moved[:, 2:] > 0.5,
        }

    def __getstate__(self) -> dict[str, object]:
        """Leave the trainer behind: workers that are spawned receive a copy of this object."""
        return {**self.__dict__, "trainer": None}
