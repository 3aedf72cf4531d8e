"""Means over images, on one and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.testing import assert_close

from explainers.evaluation.metrics.localisation import (
    PERCENTILES,
    Localisation,
    localisation_scores,
    score_names,
)
from explainers.evaluation.metrics.mean import ImageMean
from explainers.evaluation.metrics.pointing import pointing_game

SCRIPT = """
import json, sys, torch
from torch import distributed as dist
from explainers.evaluation.metrics.boxes import MaxBoxAccuracy, PixelAveragePrecision
from explainers.evaluation.metrics.localisation import PERCENTILES, localisation_scores, score_names
from explainers.evaluation.metrics.mean import ImageMean
rank, world = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    store = f"file://{sys.argv[3]}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
saliency = torch.rand(7, 12, 12, generator=generator)
mask = torch.rand(7, 12, 12, generator=generator) < 0.1
mask[2] = False
boxes = [torch.tensor([[1.0, 1.0, 6.0, 7.0]])] * 7
scores = {}
averaged = ImageMean(localisation_scores, score_names(PERCENTILES))
metrics = averaged, PixelAveragePrecision(), MaxBoxAccuracy(thresholds=20)
for metric in metrics:
    for k in range(rank, 7, world):
        last = boxes[k : k + 1] if isinstance(metric, MaxBoxAccuracy) else mask[k : k + 1]
        metric.update(saliency[k : k + 1], last)
    found = metric.compute()
    found = found if isinstance(found, dict) else {"pxap": found}
    scores |= {name: value.item() for name, value in found.items()}
if rank == 0:
    print(json.dumps(scores))
if world > 1:
    dist.destroy_process_group()  # else its threads may end the process at its exit
"""


def test_it_is_the_mean_of_images_with_a_mask() -> None:
    saliency, mask = torch.rand(6, 9, 9), torch.rand(6, 9, 9) < 0.2
    mask[1] = False
    ours, known = ImageMean(localisation_scores, score_names(PERCENTILES)), Localisation()
    for part in (slice(0, 2), slice(2, 6)):
        ours.update(saliency[part], mask[part])
        known.update(saliency[part], mask[part])
    assert_close(ours.compute(), known.compute())


def test_one_score_and_settings() -> None:
    metric = ImageMean(partial(pointing_game, tolerance=0.0))
    saliency, mask = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4).bool()
    saliency[:, 1, 1] = 1
    mask[0, 1, 1] = mask[1, 0, 0] = True
    metric.update(saliency, mask)
    assert metric.compute() == {"mean": torch.tensor(0.5), "count": torch.tensor(2)}
    metric.reset()
    assert metric.compute()["mean"].isnan()
    metric.update(saliency[:1], mask[:1])
    assert metric.compute()["mean"] == 1


def test_after_a_reset_several_scores_start_anew() -> None:
    metric = Localisation()
    metric.update(torch.rand(2, 9, 9), torch.rand(2, 9, 9) < 0.2)
    metric.reset()
    empty = metric.compute()
    assert empty.pop("count") == 0
    assert list(empty) == score_names(PERCENTILES)
    assert all(value.isnan() for value in empty.values())


def test_two_processes_give_the_values_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(world: int) -> dict[str, float]:
        command = [sys.executable, "-c", SCRIPT]
        arguments = [
            [str(rank), str(world), str(tmp_path / f"store{world}")] for rank in range(world)
        ]
        started = [
            subprocess.Popen([*command, *each], env=environment, stdout=subprocess.PIPE, text=True)
            for each in arguments
        ]
        texts = [process.communicate(timeout=120)[0] for process in started]
        assert all(process.returncode == 0 for process in started)
        return json.loads(texts[0])

    one, two = run(1), run(2)
    assert one.keys() == two.keys()
    assert_close(
        torch.tensor(list(two.values())).double(), torch.tensor(list(one.values())).double()
    )
