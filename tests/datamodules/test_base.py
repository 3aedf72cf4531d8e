"""Splits, loaders and augmentation, on a data module of drawn images."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, distributed, multiprocessing
from torch.testing import assert_close

from classifiers import Optimisation
from datamodules.base import (
    SPLITS,
    Augmentation,
    Batch,
    EvenBatches,
    ImageDataModule,
    Images,
    Loading,
    Record,
    Sample,
    TrainingOrder,
    collate,
    data_root,
    pack,
    split_by_seed,
    unpack,
)
from datamodules.images import BadImage

SMALL = Loading(size=8, batch_size=4)


class Drawn(ImageDataModule):
    """Records as given; an image holds its own number in 1/255, positives a square of evidence."""

    class_names = ("normal", "lesion")

    def __init__(
        self,
        rows: Sequence[Record],
        loading: Loading = SMALL,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading, augmentation, seed, fold, folds)
        self.rows, self.reads = list(rows), Counter[str]()

    def records(self) -> list[Record]:
        return self.rows

    def read(self, record: Record) -> Sample:
        self.reads[record.id] += 1
        image = torch.full((1, 8, 8), int(record.id) / 255)
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[2:5, 1:4] = True
        return Sample(image.masked_fill(mask, 1.0), mask) if record.label else Sample(image, None)


def rows(count: int, split: bool = False) -> list[Record]:
    """Alternating labels; with ``split``, 3 of 5 train, then val, then test."""
    names = ("train", "train", "train", "val", "test") if split else ("",) * 5
    return [Record(str(i), i % 2, names[i % 5]) for i in range(count)]  # type: ignore[arg-type]


def ids(loader: object) -> list[str]:
    """Ids of every batch in order."""
    return [name for batch in loader for name in batch["id"]]  # type: ignore[attr-defined]


def test_data_root_is_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMADV_DATA", "/somewhere")
    assert data_root() == Path("/somewhere")
    monkeypatch.delenv("SIMADV_DATA")
    assert data_root() == Path("data")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_even_batches_hold_every_image_once(images: int, batch_size: int, processes: int) -> None:
    if images < processes:
        with pytest.raises(ValueError, match="Every process needs an image"):
            EvenBatches(images, batch_size, processes)
        return
    samplers = [EvenBatches(images, batch_size, processes, rank) for rank in range(processes)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(mine) for mine in batches} == {len(samplers[0])}
    lengths = [len(batch) for mine in batches for batch in mine]
    assert min(lengths) >= 1
    assert max(lengths) <= max(batch_size, 2 if processes > 1 else 1)
    assert sorted(i for mine in batches for batch in mine for i in batch) == list(range(images))


def test_even_batches_by_hand() -> None:  # 7 images in 2 rounds of 2 batches: 2, 2, 2, 1
    assert list(EvenBatches(7, 2, processes=2, rank=0)) == [[0, 1], [4, 5]]
    assert list(EvenBatches(7, 2, processes=2, rank=1)) == [[2, 3], [6]]


def test_table_split_is_kept() -> None:
    data = Drawn(rows(10, split=True))
    data.setup()
    found = {split: [record.id for record in data.splits[split]] for split in SPLITS}
    assert found == {"train": ["0", "1", "2", "5", "6", "7"], "val": ["3", "8"], "test": ["4", "9"]}


def test_drawn_split_agrees_with_scikit_learn() -> None:
    records = [Record(str(i), int(i % 3 == 0), group=str(i // 2)) for i in range(80)]
    labels, groups = [record.label for record in records], [i // 2 for i in range(80)]
    kfold = StratifiedGroupKFold(10, shuffle=True, random_state=3)
    tests = [test.tolist() for _, test in kfold.split(labels, labels, groups)]
    splits = split_by_seed(records, 3)
    assert [int(record.id) for record in splits["test"]] == tests[0]
    assert [int(record.id) for record in splits["val"]] == tests[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(40, 80), st.integers(1, 3))
def test_drawn_split_keeps_groups_and_shares(seed: int, count: int, members: int) -> None:
    records = [Record(str(i), i // members % 2, group=f"g{i // members}") for i in range(count)]
    splits = split_by_seed(records, seed, folds=5)
    assert Counter(r.id for part in splits.values() for r in part) == Counter(r.id for r in records)
    homes = [{record.group for record in part} for part in splits.values()]
    assert not homes[0] & homes[1] | homes[0] & homes[2] | homes[1] & homes[2]
    share = sum(record.label for record in splits["train"]) / len(splits["train"])
    assert abs(share - 0.5) < 0.15


def test_images_without_a_group_are_no_group() -> None:
    splits = split_by_seed(rows(50), 0)
    assert [len(splits[split]) for split in SPLITS] == [40, 5, 5]


def test_each_fold_is_the_test_set_once_and_the_next_validates() -> None:
    folds = [Drawn(rows(30, split=True), fold=fold, folds=3) for fold in range(3)]
    for data in folds:
        data.setup()
    tests = [{record.id for record in data.splits["test"]} for data in folds]
    assert set.union(*tests) == {str(i) for i in range(30)}
    assert sum(map(len, tests)) == 30
    for i, data in enumerate(folds):
        assert {record.id for record in data.splits["val"]} == tests[(i + 1) % 3]
        assert {record.id for record in data.splits["train"]} == tests[(i + 2) % 3]


def test_setup_reads_the_table_once() -> None:
    data = Drawn(rows(20))
    data.setup("fit")
    first = data.splits
    data.rows.clear()
    data.setup("test")
    assert data.splits is first
    assert [len(first[split]) for split in SPLITS] == [16, 2, 2]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([*rows(20), Record("3", 0)], "unique, but '3' comes 2 times"),
        ([Record("1", 0, "train"), Record("2", 1, "test")], "'val' of Drawn"),
        ([*rows(4, split=True), Record("9", 0)], "1 of 5 name none .the first is '9'"),
        (rows(9), "10 folds need as many groups, but the data set has 9"),
        (
            [Record("1", 0, "train", "p"), Record("2", 1, "val", "p"), Record("3", 1, "test")],
            "'p' has images in 'train' and 'val' .image '2'",
        ),
    ],
)
def test_bad_splits_are_named(records: list[Record], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawn(records).setup()


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 2)])
def test_fold_out_of_range(fold: int, folds: int) -> None:
    with pytest.raises(ValueError, match=rf"but got {fold if folds > 2 else folds}\."):
        Drawn(rows(20), fold=fold, folds=folds)


def test_batch_by_hand() -> None:
    data = Drawn([])
    records = [Record("0", 0, columns={"age": "7"}), Record("51", 1, columns={"sex": "f"})]
    batch = collate([(record, data.read(record)) for record in records])
    assert batch["image"].shape == (2, 1, 8, 8)
    assert_close(batch["image"][:, 0, 0, 0], torch.tensor([0.0, 0.2]))
    assert batch["label"].tolist() == [0, 1]
    assert batch["mask"].sum((1, 2)).tolist() == [0, 9]
    assert batch["has_mask"].tolist() == [False, True]
    assert batch["columns"] == {"age": ["7", ""], "sex": ["", "f"]}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=9), st.booleans())
def test_pack_is_exact_for_bytes_and_fine_for_the_rest(values: list[int], halves: bool) -> None:
    image = (torch.tensor(values)[None, None] + (0.4 if halves else 0.0)) / (256 if halves else 255)
    packed = pack(image)
    assert packed.dtype == (torch.uint16 if halves else torch.uint8)
    assert_close(unpack(packed), image, rtol=0, atol=0.51 / 65535 if halves else 0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_are_read_once_where_they_are_kept(in_memory: bool) -> None:
    data = Drawn(rows(20), Loading(size=8, batch_size=4, in_memory=in_memory))
    first, second = (torch.cat([b["image"] for b in data.loader("train")]) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert set(data.reads.values()) == ({1} if in_memory else {2})


def test_training_order_follows_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[str]:
        loader = Drawn(rows(60, split=True), seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        return ids(loader)

    first = order(1, 0)
    assert len(set(first)) == 36
    assert first == order(1, 0)
    assert sorted(first) == sorted(order(2, 0))
    assert first not in (order(1, 1), order(2, 0))
    assert first != sorted(first, key=int)


def asking(**optimisation: int) -> Mock:
    """A trainer of a module that asks for epochs of this kind."""
    return Mock(lightning_module=Mock(optimisation=Optimisation(**optimisation)))


@pytest.mark.parametrize(
    ("ratio", "times", "normal"), [(1, {2}, {18}), (3, {3}, {9}), (4, {3, 4}, {7, 8})]
)
def test_few_abnormal_images_come_several_times_an_epoch_where_asked_for(
    ratio: int, times: set[int], normal: set[int]
) -> None:
    """Of 36 training images 9 are abnormal: they fill their share, the 27 others come in turn."""
    data = Drawn([replace(r, label=int(k % 4 == 0)) for k, r in enumerate(rows(60, split=True))])
    plain, epochs = data.train_dataloader(), []
    data.trainer = asking(abnormal_per_normal=ratio)
    loader: Any = data.train_dataloader()
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)
        epochs.append(Counter(ids(loader)))
    assert len(set(ids(plain))) == 36
    abnormal = {record.id for record in data.splits["train"] if record.label}
    assert len(abnormal) == 9
    for seen in epochs:
        assert sum(seen.values()) == 36
        assert {seen[name] for name in abnormal} == times
        assert sum(n for name, n in seen.items() if name not in abnormal) in normal
        assert all(n == 1 for name, n in seen.items() if name not in abnormal)
    assert len(set().union(*epochs)) == 36
    parts = [TrainingOrder(loader.dataset, 2, rank, seed=0) for rank in (0, 1)]
    for part in parts:
        part.balance([record.label for record in data.splits["train"]], ratio)
        part.set_epoch(1)
    both = [loader.dataset.records[k].id for part in parts for k in part]
    assert Counter(both) == epochs[1]


@pytest.mark.parametrize(
    ("labels", "ratio", "times"),
    [
        ([0] * 8 + [1], 4, [1, 1] + 6 * [0] + [8]),  # of ten places, eight are the abnormal image's
        ([0] * 9, 4, [1] * 9),
        ([1] * 9, 4, [1] * 9),
        ([0, 1, 1], 2, [1] * 3),
        ([0, 1, 1], 0, [1] * 3),
    ],
)
def test_balanced_order(labels: list[int], ratio: int, times: list[int]) -> None:
    """It stays as it is where one kind is missing, or enough images are abnormal."""
    order = TrainingOrder(Images(rows(len(labels)), Mock()), 1, 0, seed=0)
    order.balance(labels, ratio)
    seen = list(order) if not order.ratio else [order.balanced(place) for place in range(10)]
    assert [seen.count(k) for k in range(len(labels))] == times


@pytest.mark.parametrize(("least", "turns"), [(0, 1), (71, 1), (72, 2), (120, 3)])
def test_few_images_are_gone_through_several_times_an_epoch(least: int, turns: int) -> None:
    data = Drawn(rows(60, split=True), Loading(size=8, batch_size=6))  # 36 of training
    plain = data.train_dataloader()
    data.trainer = asking(epoch_images=least)
    loader: Any = data.train_dataloader()
    assert len(loader) == 6 * turns
    loader.sampler.set_epoch(1)
    seen, every = ids(loader), sorted(record.id for record in data.splits["train"])
    for turn in range(turns):
        plain.sampler.set_epoch(turns + turn)  # type: ignore[attr-defined]
        assert seen[36 * turn : 36 * (turn + 1)] == ids(plain)
        assert sorted(ids(plain)) == every
    loader.load_state_dict({"given": 5})
    assert ids(loader) == seen[30:]


def test_enough_abnormal_images_change_no_order() -> None:
    data = Drawn([replace(r, label=int(k % 2 == 0)) for k, r in enumerate(rows(60, split=True))])
    before = ids(data.train_dataloader())
    data.trainer = asking(abnormal_per_normal=1)
    assert ids(data.train_dataloader()) == before


@pytest.mark.parametrize(("images", "expected"), [(10, [4]), (5, [3]), (15, [4, 4])])
def test_last_small_training_batch_is_left_out(images: int, expected: list[int]) -> None:
    # 6, 3 and 9 training images in batches of 4
    loader = Drawn(rows(images, split=True)).train_dataloader()
    assert [len(batch["id"]) for batch in loader] == expected


def test_evaluation_loaders_give_every_image_once_in_order() -> None:
    data = Drawn(rows(50))
    data.setup()
    for split in SPLITS:
        assert ids(data.loader(split)) == [record.id for record in data.splits[split]]
    assert ids(data.val_dataloader()) == ids(data.loader("val"))
    assert ids(data.test_dataloader()) == ids(data.loader("test"))


def test_workers_give_the_same_batches() -> None:
    alone = Drawn(rows(50))
    helped = Drawn(rows(50), Loading(size=8, batch_size=4, workers=2))
    assert ids(helped.loader("train")) == ids(alone.loader("train"))


def test_a_copy_for_a_spawned_worker_leaves_the_trainer_behind() -> None:
    data = Drawn(rows(50))
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    copy = pickle.loads(pickle.dumps(data.dataset("val")))
    assert copy[0][0] == data.splits["val"][0]
    assert copy.read.__self__.trainer is None


def augmented(data: Drawn, training: bool) -> tuple[Batch, Batch]:
    batch = collate([(record, data.read(record)) for record in data.rows])
    data.trainer = Mock(training=training)
    return batch, data.on_after_batch_transfer(batch, 0)


def test_augmentation_moves_image_and_mask_together() -> None:
    torch.manual_seed(0)
    flips = Augmentation(rotation=0, translation=0, zoom=0, horizontal_flip=1, vertical_flip=1)
    before, after = augmented(Drawn(rows(10), augmentation=flips), training=True)
    assert_close(after["image"], before["image"].flip(2, 3))
    assert after["mask"].dtype == torch.bool
    assert torch.equal(after["mask"], before["mask"].flip(1, 2))
    assert after["id"] == before["id"]


def test_augmented_evidence_stays_on_its_pixels() -> None:
    torch.manual_seed(0)
    _, after = augmented(Drawn(rows(40), augmentation=Augmentation()), training=True)
    positive = after["label"] == 1
    image, mask = after["image"][positive, 0], after["mask"][positive]
    assert image[mask].mean() > 0.85  # evidence is 1.0, the rest below 0.16
    assert image[~mask].mean() < 0.25
    assert torch.equal(after["has_mask"], after["mask"].flatten(1).any(1))
    assert len({tuple(one.flatten().tolist()) for one in mask}) > 5  # drawn per image


class Told(Drawn):
    """The evidence is of one kind and of level 3; another kind and level -1 are beside it."""

    feature_names = ("square", "strip")

    def read(self, record: Record) -> Sample:
        sample = super().read(record)
        strip = torch.zeros(8, 8, dtype=torch.bool)
        strip[6] = True
        level = torch.zeros(8, 8, dtype=torch.int8).masked_fill(strip, -1)
        if sample.mask is None:
            return replace(sample, features={"strip": strip}, importance=level)
        level = level.masked_fill(sample.mask, 3)
        return replace(sample, features={"square": sample.mask, "strip": strip}, importance=level)


def test_features_and_levels_reach_the_batch_and_stay_in_memory() -> None:
    data = Told(rows(20))
    for _ in range(2):
        for batch in data.loader("test"):
            assert batch["features"].shape[1:] == (2, 8, 8)
            assert batch["features"][:, 0].equal(batch["mask"])
            assert (batch["features"][:, 1].sum((1, 2)) == 8).all()
            assert batch["importance"].dtype == torch.int8
            assert (batch["importance"] == 3).equal(batch["mask"])
    assert set(data.reads.values()) == {1}
    plain = next(iter(Drawn(rows(20)).loader("test")))
    assert plain["features"].shape == (len(plain["id"]), 0, 8, 8)
    assert not plain["importance"].any()


def test_features_and_levels_are_augmented_with_the_mask() -> None:
    torch.manual_seed(0)
    data = Told(rows(10), augmentation=Augmentation())
    items = [(record, data.read(record)) for record in data.rows]
    data.trainer = Mock(training=True)
    after = data.on_after_batch_transfer(collate(items, data.feature_names), 0)
    assert after["features"].dtype == torch.bool
    assert after["features"][:, 0].equal(after["mask"])
    assert after["importance"].dtype == torch.int8
    assert (after["importance"] == 3).equal(after["mask"])
    assert not (after["features"][:, 1] & after["mask"]).any()


def test_mask_moved_out_of_the_image_is_no_mask() -> None:
    torch.manual_seed(0)
    away = Augmentation(rotation=0, translation=0.9, zoom=0, horizontal_flip=0)
    _, after = augmented(Drawn(rows(60), augmentation=away), training=True)
    assert 0 < int(after["has_mask"].sum()) < 30
    assert torch.equal(after["has_mask"], after["mask"].flatten(1).any(1))


def test_evaluation_is_not_augmented() -> None:
    before, after = augmented(Drawn(rows(10), augmentation=Augmentation()), training=False)
    assert after is before


class Sees(LightningModule):
    """Counts the images of each stage in a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[str]] = {"train": [], "val": []}
        self.changed: dict[str, bool] = {"train": False, "val": False}

    def see(self, stage: str, batch: Batch) -> None:
        self.seen[stage] += batch["id"]
        edge = torch.zeros(8, 8, dtype=torch.bool)
        edge[2:5, 1:4] = True
        moved = batch["mask"] != (edge & batch["has_mask"][:, None, None])
        self.changed[stage] |= bool(moved.any())

    def training_step(self, batch: Batch) -> Tensor:
        self.see("train", batch)
        return self.weight**2

    def validation_step(self, batch: Batch) -> None:
        self.see("val", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_trainer_shuffles_anew_each_epoch_and_augments_training_alone() -> None:
    torch.manual_seed(0)
    module, data = Sees(), Drawn(rows(40), augmentation=Augmentation())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    first, second = module.seen["train"][:32], module.seen["train"][32:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert module.seen["val"] == 2 * [record.id for record in data.splits["val"]]
    assert module.changed == {"train": True, "val": False}


class Torn(Drawn):
    """Images 1 and 6 (training) and 8 (validation) cannot be read."""

    def read(self, record: Record) -> Sample:
        if record.id in {"1", "6", "8"}:
            self.reads[record.id] += 1
            raise BadImage(f"Image {record.id} cannot be read: torn.")
        return super().read(record)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_the_others_stay(workers: int) -> None:
    loading = Loading(size=8, batch_size=4, workers=workers, on_bad_image="skip")
    for split in (True, False):
        data, intact = Torn(rows(50, split), loading), Drawn(rows(50, split))
        with pytest.warns(UserWarning, match="^Left out: ") as told:
            data.setup()
        sentences = [f"Left out: Image {name} cannot be read: torn." for name in ("1", "6", "8")]
        assert sorted(str(one.message) for one in told) == sentences
        intact.setup()
        for name in SPLITS:
            kept = [r for r in intact.splits[name] if r.id not in {"1", "6", "8"}]
            assert data.splits[name] == kept
            assert ids(data.loader(name)) == [record.id for record in kept]
        assert workers or set(data.reads.values()) == {1}  # the check fills the memory


def test_bad_images_are_errors_unless_skipped() -> None:
    data = Torn(rows(50, split=True))
    with pytest.raises(BadImage, match="Image 1 cannot be read"):
        list(data.loader("train"))


def test_a_split_of_bad_images_alone_is_an_error() -> None:
    data = Torn(rows(9, split=True), Loading(size=8, on_bad_image="skip"))
    data.rows = [r for r in data.rows if r.split != "val" or r.id == "8"]
    with (
        pytest.warns(UserWarning, match="Left out"),
        pytest.raises(ValueError, match="'val' of Torn"),
    ):
        data.setup()


def check(rank: int, folder: Path) -> None:
    """One of two processes: write what it leaves out and how many batches it has."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = Torn(rows(50, split=True), Loading(size=8, batch_size=4, on_bad_image="skip"))
    data.setup()
    told = [sorted(data.skipped), len(data.train_dataloader()), sum(data.reads.values())]
    (folder / str(rank)).write_text(repr(told))
    distributed.destroy_process_group()


def test_two_processes_share_the_check_and_leave_out_the_same(tmp_path: Path) -> None:
    multiprocessing.start_processes(check, (tmp_path,), nprocs=2, start_method="fork")
    assert {(tmp_path / str(rank)).read_text() for rank in range(2)} == {
        repr([["1", "6", "8"], 3, 25])  # 28 training images: 14 a process
    }


def serve(rank: int, folder: Path) -> None:
    """One of two processes: write the ids that it sees."""
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = Drawn(rows(50, split=True))
    seen = [*ids(data.loader("val")), "|", *ids(data.train_dataloader())]
    (folder / str(rank)).write_text(" ".join(seen))
    distributed.destroy_process_group()


def test_two_processes_share_the_images(tmp_path: Path) -> None:
    multiprocessing.start_processes(serve, (tmp_path,), nprocs=2, start_method="fork")
    parts = [(tmp_path / str(rank)).read_text().split("|") for rank in range(2)]
    evaluated, trained = (parts[0][i].split() + parts[1][i].split() for i in range(2))
    records = rows(50, split=True)
    assert sorted(evaluated) == sorted(r.id for r in records if r.split == "val")
    assert len(set(trained)) == len(trained) == 24  # 30 images: 15 a process, whole batches of 4
    assert set(trained) <= {record.id for record in records if record.split == "train"}
