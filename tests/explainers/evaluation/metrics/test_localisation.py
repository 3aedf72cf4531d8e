"""Localisation scores against plain numpy loops and scikit-learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from saliencies import KINDS, maps
from sklearn.metrics import average_precision_score, precision_score, recall_score
from torch import Tensor
from torch.testing import assert_close

from explainers.evaluation.metrics import localisation
from explainers.evaluation.metrics.localisation import (
    Localisation,
    average_precision,
    localisation_scores,
    operating_points,
    partial_auc,
    percentile_curve,
    percentile_iou,
    rank,
    total_auc,
)


def slow_curve(
    saliency: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and IoU as the paper describes them, one percentile after the other."""
    precision, recall, iou = [], [], []
    for threshold in np.percentile(saliency, range(100)):
        predicted = saliency >= threshold
        precision.append((predicted & mask).sum() / predicted.sum())
        recall.append((predicted & mask).sum() / mask.sum())
        iou.append((predicted & mask).sum() / (predicted | mask).sum())
    return np.array(precision), np.array(recall), np.array(iou)


def assert_equals_slow_curve(saliency: Tensor, mask: Tensor) -> None:
    curve = percentile_curve(saliency, mask)
    for k in range(len(saliency)):
        slow = slow_curve(saliency[k].numpy(), mask[k].numpy())
        for ours, theirs in zip(curve, slow, strict=True):
            np.testing.assert_array_equal(ours[k].numpy(), theirs)


def test_percentile_iou_by_hand() -> None:  # the median is 2.5, {4, 3} stay: 1 shared of 3
    saliency, mask = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]]), torch.tensor([[[1, 0], [1, 0]]])
    iou = percentile_iou(saliency, mask.bool(), 50.0)
    assert_close(iou, torch.tensor([1 / 3], dtype=torch.float64))


def test_ties_at_the_threshold_stay_in() -> None:  # the 75th percentile is 1: three pixels stay
    saliency, mask = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]), torch.tensor([[[1, 0], [0, 0]]])
    assert percentile_iou(saliency, mask.bool(), 75.0).item() == pytest.approx(1 / 3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 12))
def test_curve_equals_the_numpy_loop(kind: str, seed: int, side: int) -> None:
    assert_equals_slow_curve(*maps(kind, seed, side))


@pytest.mark.parametrize("kind", ["floats", "rectified"])
def test_curve_equals_the_numpy_loop_at_full_size(kind: str) -> None:
    assert_equals_slow_curve(*maps(kind, 0, 224, count=1))


def test_zeros_of_both_signs_are_tied() -> None:
    saliency = torch.tensor([[[-0.0, 0.0], [0.0, -1.0]]])
    assert_equals_slow_curve(saliency, torch.tensor([[[True, False], [False, True]]]))


def test_threshold_lies_between_neighbouring_floats() -> None:
    """A threshold rounded to float32 would fall on the lower of the two and keep both."""
    low = np.float32(1)
    pair = np.array([low, np.nextafter(low, np.float32(2))])
    assert np.percentile(pair.astype(np.float64), 25) > low
    mask = torch.tensor([[[False, True]]])
    assert percentile_iou(torch.from_numpy(pair)[None, None], mask, 25.0).item() == 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_average_precision_equals_scikit_learn(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed)
    theirs = [
        average_precision_score(inside.flatten().numpy(), one.flatten().numpy())
        for one, inside in zip(saliency, mask, strict=True)
    ]
    np.testing.assert_allclose(average_precision(saliency, mask).numpy(), theirs, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_areas_equal_numpy_trapezoids(kind: str, seed: int) -> None:
    saliency, mask = maps(kind, seed, side=30, count=1)
    precision, recall, _ = slow_curve(saliency[0].numpy(), mask[0].numpy())
    curve = percentile_curve(saliency, mask)
    total = np.trapezoid(precision[::-1], recall[::-1])
    partial = np.trapezoid(precision[80:][::-1], recall[80:][::-1])
    assert total_auc(curve).item() == pytest.approx(total, abs=1e-12)
    assert partial_auc(curve).item() == pytest.approx(partial, abs=1e-12)


def test_curve_of_an_empty_mask_is_nan() -> None:
    saliency, mask = maps("floats", 4)
    mask[1] = False
    for scores in percentile_curve(saliency, mask):
        assert scores.isnan().all(1).tolist() == [False, True, False]


def test_perfect_two_valued_map() -> None:
    """Average precision is 1, the paper's areas are 0: the curve has no point at recall 0."""
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[:, 3:9, 4:12] = True
    with pytest.warns(UserWarning, match="1 are constant"):
        constant = localisation_scores(torch.ones(1, 20, 20), mask)
    perfect = localisation_scores(mask.float(), mask)
    assert perfect["average_precision"].item() == 1
    assert perfect["total_auc"].item() == perfect["partial_auc"].item() == 0
    assert constant["average_precision"].item() == pytest.approx(48 / 400)


def test_localisation_scores_agree_with_the_single_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saliency, mask = maps("integers", 1, count=5)
    mask[2] = False
    curve = percentile_curve(saliency, mask)
    monkeypatch.setattr(localisation, "CACHED_PIXELS", 2 * saliency[0].numel())
    scores = localisation_scores(saliency, mask, [80.0, 97.5])
    assert list(scores) == ["average_precision", "iou_80", "iou_97.5", "total_auc", "partial_auc"]
    expected = {
        "average_precision": average_precision(saliency, mask),
        "iou_80": curve.iou[:, 80],
        "iou_97.5": percentile_iou(saliency, mask, 97.5),
        "total_auc": total_auc(curve),
        "partial_auc": partial_auc(curve),
    }
    assert_close(scores, expected, equal_nan=True, rtol=0, atol=0)
    assert all(score.isnan().tolist() == [k == 2 for k in range(5)] for score in scores.values())


def test_nan_pixels_rank_lowest() -> None:
    saliency, mask = maps("floats", 2)
    unknown = saliency.clone()
    unknown[:, :2] = torch.nan
    with pytest.warns(UserWarning, match="3 hold NaN"):
        scores = localisation_scores(unknown, mask)
    assert_close(scores, localisation_scores(unknown.nan_to_num(nan=-100.0), mask))


def test_infinite_and_unknown_maps_are_scored() -> None:
    mask = torch.tensor([[[True, False], [False, False]]])
    infinite = torch.tensor([[[torch.inf, 1.0], [0.0, -torch.inf]]])
    assert average_precision(infinite, mask).item() == 1
    assert percentile_iou(infinite, mask, 90.0).item() == 1
    assert average_precision(torch.full((1, 2, 2), torch.nan), mask).item() == 0.25


def test_errors_name_the_value() -> None:
    saliency, mask = maps("floats", 0)
    with pytest.raises(ValueError, match=r"\[0, 100\), but got \[100.0\]"):
        percentile_iou(saliency, mask, 100.0)
    with pytest.raises(ValueError, match="mask boolean"):
        rank(saliency, mask.float())
    with pytest.raises(ValueError, match=r"\(3, 9, 10\) and \(2, 9, 10\)"):
        rank(saliency, mask[:2])


def test_metric_leaves_empty_masks_out() -> None:
    saliency, mask = maps("floats", 3, count=4)
    mask[1] = False
    metric = Localisation([95.0])
    metric.update(saliency[:2], mask[:2])
    metric.update(saliency[2:], mask[2:])
    metric.update(saliency[:0], mask[:0])
    means, scores = metric.compute(), localisation_scores(saliency, mask, [95.0])
    assert means.pop("count").item() == 3
    assert_close(means, {name: values.nanmean() for name, values in scores.items()})


def test_metric_without_a_mask_is_nan() -> None:
    metric = Localisation()
    metric.update(torch.rand(2, 5, 5), torch.zeros(2, 5, 5, dtype=torch.bool))
    means = metric.compute()
    assert means.pop("count") == 0
    assert all(mean.isnan() for mean in means.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    saliency, mask = maps("rectified", 5, 64)
    scores = localisation_scores(saliency.cuda(), mask.cuda())
    on_cpu = {name: values.cpu() for name, values in scores.items()}
    assert_close(on_cpu, localisation_scores(saliency, mask), rtol=0, atol=1e-12)


WORKER = """
import json, sys
import torch
from explainers.evaluation.metrics import Decisions, ImageSimilarity, Localisation

rank, store = int(sys.argv[1]), sys.argv[2]
generator = torch.Generator().manual_seed(0)
image, other, third = torch.rand(3, 7, 1, 16, 16, generator=generator)
mask = torch.rand(7, 16, 16, generator=generator) < 0.2
mask[4], other[2] = False, image[2]
one, two = torch.rand(2, 7, 3, generator=generator).softmax(-1)

def scores(part):
    localisation, decisions, similarity = Localisation(), Decisions(3), ImageSimilarity()
    localisation.update(third[part, 0], mask[part])
    classes = torch.arange(7) % 3, one, two, one.argmax(1), two.argmax(1)
    decisions.update(*(value[part] for value in classes))
    similarity.update(image[part], other[part])
    values = {**localisation.compute(), **decisions.compute(), **similarity.compute()}
    return {name: float(value) for name, value in values.items()}

alone = scores(slice(None))
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
print(json.dumps([scores(slice(0, 5) if rank == 0 else slice(5, 7)), alone]))
"""


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    """All seven images alone, then five on the first process and two on the second."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), f"file://{tmp_path / 'store'}"],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [json.loads(worker.communicate(timeout=600)[0]) for worker in workers]
    (first, alone), (second, _) = printed
    assert alone["count"] == 6
    assert alone["identical"] == 1
    assert first == second
    assert first == pytest.approx(alone, abs=1e-6)


def test_operating_points_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(3, 20, 15, generator=generator)
    mask = torch.rand(3, 20, 15, generator=generator) > 0.8
    mask[2] = False
    points = operating_points(maps, mask, (80.0, 97.5))
    assert list(points) == ["precision_80", "precision_97.5", "recall_80", "recall_97.5"]
    for k in range(2):
        for p in (80.0, 97.5):
            predicted = maps[k].flatten().numpy() >= np.percentile(maps[k].numpy(), p)
            truth = mask[k].flatten().numpy()
            assert points[f"precision_{p:g}"][k] == pytest.approx(precision_score(truth, predicted))
            assert points[f"recall_{p:g}"][k] == pytest.approx(recall_score(truth, predicted))
    assert all(values[2].isnan() for values in points.values())
