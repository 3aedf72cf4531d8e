"""Generated images against the real one of the other class."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from classifiers.network import Network
from datamodules import ImageTable
from datamodules.base import Loading
from evaluate import real_image
from explainers.evaluation.compare import score_generated
from explainers.evaluation.counterfactual import counterpart_scores

DATA = Path(os.environ.get("SIMADV_DATA", "data"))


def scored(defect: Tensor, normal: Tensor, adversarial: Tensor) -> pd.Series:
    """Mean of each metric, of a defect in the left half, an image without mask and a stray one."""
    mask = torch.zeros(3, 24, 24, dtype=torch.bool)
    mask[[0, 2], :, :12] = True
    batch = {
        "image": torch.stack([defect, normal, defect]),
        "mask": mask,
        "has_mask": mask.flatten(1).any(1),
        "id": ["d", "n", "stray"],
        "columns": {"counterpart": ["n", "d", "elsewhere"]},
    }
    found = score_generated(
        "m",
        lambda x: (x, adversarial.expand_as(x)),
        Network("test_resnet").eval(),
        [batch],
        torch.device("cpu"),
        {"n": normal, "d": defect}.get,
    )
    table = pd.DataFrame(found).query("metric.str.contains('_real_')")
    assert set(table["id"]) == {"d"}
    return table.set_index("metric")["value"]


def test_a_perfect_counterfactual_and_an_unchanged_image() -> None:
    normal = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.5
    defect = normal.clone()
    defect[:, :, :12] += 0.1  # 20 dB
    scores = scored(defect, normal, adversarial=normal)
    assert scores["ssim_xa_real_inside"] == scores["ssim_xa_real_outside"] == pytest.approx(1)
    assert scores["psnr_x_real_inside"] == pytest.approx(20, abs=1e-4)
    assert scores["psnr_xs_real_inside"] == scores["psnr_x_real_inside"]
    assert scores["ssim_x_real_inside"] < scores["ssim_x_real_outside"] < 1
    infinite = {"psnr_xa_real_inside", "psnr_xa_real_outside"}
    infinite |= {"psnr_x_real_outside", "psnr_xs_real_outside"}
    assert not infinite & set(scores.index)


def test_without_counterparts_there_are_no_scores() -> None:
    mask = torch.ones(1, 24, 24, dtype=torch.bool)
    batch = {"image": torch.rand(1, 1, 24, 24), "mask": mask, "id": ["a"], "columns": {}}
    batch["has_mask"] = torch.tensor([True])
    assert counterpart_scores(batch, {"x": batch["image"]}, {}.get) == ([], {})


@pytest.mark.skipif(not (DATA / "deeppcb").is_dir(), reason="needs deeppcb in SIMADV_DATA")
def test_counterparts_of_deeppcb_differ_most_inside_the_boxes() -> None:
    data = ImageTable("deeppcb/labels.csv", classes=["normal", "defect"], loading=Loading(size=96))
    data.prepare_data()
    real, found = real_image(data, "val"), []
    for batch in data.loader("val"):
        ids, scores = counterpart_scores(batch, {"x": batch["image"]}, real)
        assert len(ids) == batch["has_mask"].sum()
        found.append(pd.DataFrame({metric: values.numpy() for metric, values in scores.items()}))
    means = pd.concat(found).mean()
    assert means["ssim_x_real_inside"] < means["ssim_x_real_outside"]
