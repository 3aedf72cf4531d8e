"""Drawn chests: frozen pixels, exact evidence, sizes of the real boxes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from datamodules import Phantom
from datamodules.base import Loading, Sample, data_root
from datamodules.phantom import (
    BOX_HEIGHT,
    BOX_WIDTH,
    LUNG_HEIGHT,
    LUNG_WIDTH,
    Opacity,
    Pose,
    quantile,
    step,
    to_pixels,
)
from datamodules.rsna import SIDE, read_tables

FROZEN = "b76425619a80237890af7acb87ee720bbf608010b2ed7edeacd47493f19ab7de"


def phantom(size: int = 64, difficulty: float = 1.0, images: int = 12, seed: int = 0) -> Phantom:
    """A few images of each split."""
    loading = Loading(size=size, batch_size=8)
    return Phantom(images, images, images, difficulty, loading=loading, seed=seed)


def sample(data: Phantom, number: int) -> Sample:
    return data.read(data.record("test", number))


def byte(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def test_default_images_are_frozen() -> None:
    data = Phantom()
    images = torch.stack([byte(sample(data, i).image) for i in range(6)])
    assert images.shape == (6, 1, 64, 64)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == FROZEN


def test_default_splits_and_labels() -> None:
    data = Phantom()
    data.setup()
    assert {split: len(records) for split, records in data.splits.items()} == {
        "train": 3000,
        "val": 300,
        "test": 600,
    }
    assert data.class_names == ("healthy", "opacity")
    assert sum(record.label for record in data.splits["train"]) == 1500


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(24, 120))
def test_opacities_change_exactly_the_pixels_of_the_mask(number: int, size: int) -> None:
    number = 2 * number + 1
    hard = sample(phantom(size, difficulty=1e9), number)  # as good as healthy
    easy = sample(phantom(size, difficulty=0.2), number)
    assert hard.mask is not None
    assert easy.mask is not None
    assert torch.equal(hard.mask, easy.mask)
    changed = byte(hard.image)[0] != byte(easy.image)[0]
    assert not (changed & ~easy.mask).any()
    assert (changed & easy.mask).sum() > 0.5 * easy.mask.sum()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(24, 120))
def test_boxes_are_the_tight_boxes_of_the_outlines(number: int, size: int) -> None:
    _, _, opacities = phantom(size).plan("train", 2 * number + 1)
    for opacity in opacities:
        inside = opacity.depth() > 0
        x0, y0, x1, y1 = opacity.box
        assert inside.shape == (y1 - y0, x1 - x0)
        assert inside.any(0).all()
        assert inside.any(1).all()
        assert 0 <= x0 < x1 <= size
        assert 0 <= y0 < y1 <= size


@pytest.mark.parametrize("number", range(1, 16, 2))
def test_boxes_as_evidence_are_the_boxes_of_the_column(number: int) -> None:
    data = Phantom(12, 12, 12, evidence="boxes")
    expected = torch.zeros(64, 64, dtype=torch.bool)
    columns = data.record("test", number).columns
    boxes = json.loads(columns["boxes"])
    for x0, y0, x1, y1 in boxes:
        expected[y0:y1, x0:x1] = True
    mask, outline = sample(data, number).mask, sample(phantom(), number).mask
    assert 1 <= len(boxes) <= 2
    assert mask is not None
    assert outline is not None
    assert torch.equal(mask, expected)
    assert (mask & outline).sum() == outline.sum() < mask.sum()
    assert columns["opacities"] == str(len(boxes))
    assert float(columns["box_share"]) == pytest.approx(float(mask.float().mean()), abs=1e-4)


def test_healthy_images_have_no_evidence() -> None:
    data = phantom()
    record = data.record("test", 4)
    mask = data.read(record).mask
    assert record.label == 0
    assert record.columns == {"boxes": "", "opacities": "0", "box_share": ""}
    assert mask is not None
    assert not mask.any()


def test_an_image_depends_on_its_seed_split_and_number_alone() -> None:
    few, many = phantom(images=3), phantom(images=9)
    assert torch.equal(sample(few, 1).image, sample(many, 1).image)
    others = [phantom(seed=1).read(few.record("test", 1)), few.read(few.record("val", 1))]
    for other in others:
        assert not torch.equal(other.image, sample(few, 1).image)


def test_anatomy_is_the_same_at_any_size() -> None:
    small, large = sample(phantom(32), 3), sample(phantom(128), 3)
    assert small.mask is not None
    assert large.mask is not None
    shrunk = torch.nn.functional.avg_pool2d(large.mask[None].float(), 4)[0] >= 0.5
    assert (shrunk & small.mask).sum() / (shrunk | small.mask).sum() > 0.7
    pooled = torch.nn.functional.avg_pool2d(large.image, 4).flatten()
    both = torch.stack([pooled, small.image.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_difficulty_lowers_the_contrast() -> None:
    def contrast(difficulty: float) -> float:
        healthy, ill = (sample(phantom(difficulty=d), 3) for d in (1e9, difficulty))
        assert ill.mask is not None
        return float((ill.image - healthy.image)[0][ill.mask].mean())

    assert contrast(1.0) > 1.7 * contrast(2.0) > 0


@pytest.mark.parametrize("difficulty", [0.0, -1.0])
def test_difficulty_must_be_positive(difficulty: float) -> None:
    with pytest.raises(ValueError, match=f"positive, but got {difficulty}"):
        Phantom(difficulty=difficulty)


def test_an_empty_split_is_named() -> None:
    with pytest.raises(ValueError, match="'val' of Phantom"):
        Phantom(4, 0, 4).setup()


def test_colour_repeats_grey() -> None:
    data = Phantom(4, 4, 4, loading=Loading(size=32, channels=3))
    image = sample(data, 1).image
    assert image.shape == (3, 32, 32)
    assert torch.equal(image, sample(phantom(32), 1).image.expand(3, -1, -1))


def test_a_fold_mixes_the_three_splits() -> None:
    data = Phantom(20, 10, 10, fold=1, folds=4)
    data.setup()
    assert {record.id.split("-")[0] for record in data.splits["train"]} == {"train", "val", "test"}
    assert sum(map(len, data.splits.values())) == 40


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3))
def test_quantile_follows_the_normal_distribution(value: float) -> None:
    rank = float(norm.cdf(value))
    expected = np.interp(rank, np.linspace(0, 1, len(BOX_WIDTH)), BOX_WIDTH)
    # the logistic curve is off by less than 0.01 in rank: at the most a fifth of a step
    slack = 0.2 * np.diff(BOX_WIDTH).max()
    assert abs(quantile(value, BOX_WIDTH) - expected) <= slack
    assert quantile(0.0, BOX_HEIGHT) == BOX_HEIGHT[10]


def test_sides_follow_the_real_boxes() -> None:
    rng, pose = np.random.RandomState(0), Pose(0, 0, 0, 1)
    boxes = np.array([Opacity.draw(rng, pose, 1, 1000).box for _ in range(3000)])
    sides = {"width": boxes[:, 2] - boxes[:, 0], "height": boxes[:, 3] - boxes[:, 1]}
    for name, real, limit in [
        ("width", BOX_WIDTH, LUNG_WIDTH),
        ("height", BOX_HEIGHT, LUNG_HEIGHT),
    ]:
        drawn = np.quantile(sides[name] / 1000, np.linspace(0, 1, 21))
        expected = np.minimum(real, limit)
        np.testing.assert_allclose(drawn[1:-1], expected[1:-1], atol=0.025)
    ranks = np.corrcoef([side.argsort().argsort() for side in sides.values()])
    assert 0.5 < ranks[0, 1] < 0.7


def test_quantiles_are_those_of_the_real_table() -> None:
    folder = data_root() / "rsna"
    if not folder.is_dir():
        pytest.skip(f"RSNA's tables are not in {folder}")
    exams = read_tables(folder).query("split == 'train' and label == 1")
    boxes = np.array([box for boxes in exams["boxes"] for box in boxes]) / SIDE
    levels = np.linspace(0, 1, 21)
    for sides, shipped in [
        (boxes[:, 2] - boxes[:, 0], BOX_WIDTH),
        (boxes[:, 3] - boxes[:, 1], BOX_HEIGHT),
    ]:
        np.testing.assert_allclose(np.quantile(sides, levels), shipped, atol=5e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.2, 1.2), st.floats(0, 1.5), st.integers(2, 300))
def test_to_pixels_stays_inside(middle: float, side: float, size: int) -> None:
    start, stop = to_pixels(middle, side, size)
    assert 0 <= start <= stop - 2 <= size - 2
    assert stop - start == min(max(round(side * size), 2), size)


def test_to_pixels_by_hand() -> None:  # 0.4 to 0.6 of 10 pixels; then moved in from the edge
    assert to_pixels(0.5, 0.2, 10) == (4, 6)
    assert to_pixels(0.95, 0.3, 10) == (7, 10)


def test_step_by_hand() -> None:  # t = 0.75 gives 3 t^2 - 2 t^3 = 0.84375
    found = step(np.array([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0]), 1.0)
    np.testing.assert_allclose(found, [0, 0, 0.5, 0.84375, 1, 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 63), st.integers(0, 63), st.integers(0, 1000))
def test_pose_maps_there_and_back(column: int, row: int, seed: int) -> None:
    pose = Pose.draw(np.random.RandomState(seed))
    x, y = pose.to_body(64)
    back = pose.to_image(x[row, column], y[row, column])
    np.testing.assert_allclose(back, [(column + 0.5) / 64, (row + 0.5) / 64])
