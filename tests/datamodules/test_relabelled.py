"""Labels that are shuffled, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from datamodules import Phantom, Relabelled
from datamodules.base import Loading


def phantom() -> Phantom:
    return Phantom(train=40, val=8, test=8, loading=Loading(size=32, batch_size=8))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_training_labels_alone_change(share: float) -> None:
    data, plain = Relabelled(phantom(), share), phantom()
    for one in (data, plain):
        one.setup()
    assert data.splits["val"] == plain.splits["val"]
    assert data.splits["test"] == plain.splits["test"]
    pairs = list(zip(data.splits["train"], plain.splits["train"], strict=True))
    assert [new.id for new, _ in pairs] == [old.id for _, old in pairs]
    assert Counter(new.label for new, _ in pairs) == Counter(old.label for _, old in pairs)
    moved = sum(new.label != old.label for new, old in pairs)
    assert 0 < moved <= share * 40


def test_images_and_masks_stay() -> None:
    data, plain = Relabelled(phantom()), phantom()
    for ours, theirs in zip(data.loader("train"), plain.loader("train"), strict=True):
        assert ours["image"].equal(theirs["image"])
        assert ours["mask"].equal(theirs["mask"])


def test_the_seed_decides() -> None:
    labels = []
    for seed in (0, 0, 1):
        data = Relabelled(phantom(), seed=seed)
        data.setup()
        labels.append([record.label for record in data.splits["train"]])
    assert labels[0] == labels[1] != labels[2]


def test_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\], but got 0"):
        Relabelled(phantom(), 0)
