"""The drawn set that no setting was chosen on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.random import RandomState
from torch.testing import assert_close

from benchmarks import surfaces
from datamodules import ImageTable
from datamodules.base import Loading


def test_a_table_is_read_as_it_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
    surfaces.main(train=10, val=4, test=6, faulty=0.2, seed=1)
    table = pd.read_csv(tmp_path / "surfaces" / "labels.csv")
    counted = table.groupby(["split", "label"]).size()
    assert counted.to_dict() == {
        ("train", "defect"): 2,
        ("train", "good"): 8,
        ("val", "defect"): 1,
        ("val", "good"): 3,
        ("test", "defect"): 3,
        ("test", "good"): 3,
    }
    data = ImageTable("surfaces/labels.csv", ["good", "defect"], loading=Loading(surfaces.SIZE))
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (6, 1, surfaces.SIZE, surfaces.SIZE)
    assert_close(batch["has_mask"], batch["label"] == 1)
    assert (batch["mask"].flatten(1).any(1) == batch["has_mask"]).all()


def test_faults_are_small_and_a_seed_repeats_them() -> None:
    for seed in range(12):
        image, mask = surfaces.draw(RandomState(seed), faulty=True)
        again, same = surfaces.draw(RandomState(seed), faulty=True)
        assert np.array_equal(image, again)
        assert np.array_equal(mask, same)
        assert 0 <= image.min() < image.max() <= 1
        assert 0.001 < mask.mean() < 0.2
    assert not surfaces.draw(RandomState(0), faulty=False)[1].any()


def test_a_share_over_all_images_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"faulty must be a share in 0 .. 1, but got 40"):
        surfaces.write(tmp_path / "new", {"train": 2}, share=40, seed=0)
    assert not (tmp_path / "new").exists()
