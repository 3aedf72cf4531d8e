"""Maps of several trainings, by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from explainers.evaluation.repeatability import Training, matrix, pair_scores, summary, write

ONE, TWO, OTHER = Training("resnet", 0), Training("resnet", 1), Training("vgg", 0)


@pytest.fixture
def maps() -> dict[Training, Tensor]:
    first = torch.rand(3, 12, 14, generator=torch.Generator().manual_seed(0))
    return {ONE: first, TWO: first.sqrt(), OTHER: first.flip(2)}


@pytest.fixture
def scores(maps: dict[Training, Tensor]) -> pd.DataFrame:
    rows = pair_scores("Gradient", maps, ["a", "b", "c"])
    return pd.DataFrame(rows).assign(group="")


def test_every_pair_and_image_once(scores: pd.DataFrame, maps: dict[Training, Tensor]) -> None:
    spearman = scores[scores["metric"] == "spearman"].set_index(["first", "second", "id"])["value"]
    assert len(spearman) == 9
    for one, two in ((ONE, TWO), (ONE, OTHER), (TWO, OTHER)):
        for k, name in enumerate("abc"):
            expected = spearmanr(maps[one][k].flatten(), maps[two][k].flatten()).statistic
            assert spearman[str(one), str(two), name] == pytest.approx(expected)


def test_within_and_between_architectures(scores: pd.DataFrame) -> None:
    table = summary(scores).set_index(["pair", "metric"])
    assert table.loc[("within", "spearman"), "mean"] == pytest.approx(1)
    between = scores[(scores["pair"] == "between") & (scores["metric"] == "spearman")]
    assert set(between["second"]) == {"vgg 0"}
    assert table.loc[("between", "spearman"), "mean"] == pytest.approx(between["value"].mean())
    assert (table["n"] == 3).all()  # images, not pairs


def test_matrix_is_symmetric_with_ones(scores: pd.DataFrame) -> None:
    table = matrix(scores, "Gradient")
    assert list(table) == list(table.index) == ["resnet 0", "resnet 1", "vgg 0"]
    assert (table.to_numpy() == table.to_numpy().T).all()
    assert (table.to_numpy().diagonal() == 1).all()
    assert table.loc["vgg 0", "resnet 1"] < 0.5 < table.loc["resnet 0", "resnet 1"]


def test_files(scores: pd.DataFrame, tmp_path: Path) -> None:
    write(scores, tmp_path / "made")
    assert len(pd.read_csv(tmp_path / "made" / "repeatability.csv")) == 4
    picture = tmp_path / "made" / "repeatability_Gradient.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "made" / "repeatability.md").read_text()
    assert "spearman within" in text
    assert "| resnet 0 | 1.0 | 1.0 |" in text
