"""Sanity scores and verdicts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from networks import small
from scipy.stats import spearmanr

from classifiers.network import Network
from classifiers.randomise import owners, randomised
from explainers.attribution import EdgeMap, Gradient
from explainers.base import Explainer
from explainers.evaluation.sanity import (
    RANDOM,
    State,
    map_scores,
    score_states,
    summary,
    verdicts,
    write,
)


def batches() -> list[dict[str, Any]]:
    """Three images, large enough for SSIM's window."""
    image, mask = torch.rand(3, 1, 16, 18), torch.zeros(3, 16, 18).bool()
    mask[:, 2:5, 3:7] = True
    return [
        {"id": ["a", "b"], "image": image[:2], "mask": mask[:2]},
        {"id": ["c"], "image": image[2:], "mask": mask[2:]},
    ]


def states() -> list[State]:
    network = small()
    other = randomised(network, owners(network), seed=1)
    return [State("cascading", 0, "", network), State("cascading", 1, "all", other)]


def test_map_scores_by_hand() -> None:
    original = torch.arange(144.0).view(1, 12, 12)
    mask = original >= 140
    same = map_scores(original, 2 * original, mask)
    assert {name: value.item() for name, value in same.items()} == pytest.approx(
        dict.fromkeys(["spearman", "ssim", "dice", "average_precision"], 1), abs=1e-6
    )
    reversed_map = map_scores(original, -original, mask)
    assert reversed_map["spearman"].item() == pytest.approx(-1)
    assert reversed_map["dice"].item() == 0


def test_step_0_is_the_original_and_an_edge_map_never_changes() -> None:
    for build in (Gradient, EdgeMap):
        scores = pd.DataFrame(score_states("m", build, states(), batches()))
        spearman = scores[scores["metric"] == "spearman"].set_index(["id", "step"])["value"]
        assert spearman.xs(0, level="step").tolist() == pytest.approx([1, 1, 1])
        changed = spearman.xs(1, level="step")
        assert bool((changed > 1 - 1e-9).all()) == (build is EdgeMap)
        assert changed.index.tolist() == ["a", "b", "c"]


def test_the_target_is_the_original_decision() -> None:
    """Spearman's correlation worked out image by image for the class decided at first."""
    before, after = (state.network for state in states())
    seen = batches()
    scores = pd.DataFrame(score_states("m", SignedGradient, states(), seen))
    found = scores.query("metric == 'spearman' and step == 1").set_index("id")["value"]
    for batch in seen:
        image = batch["image"]
        target = before.decide(image)
        maps = [SignedGradient(n).explain(image, target) for n in (before, after)]
        for k, name in enumerate(batch["id"]):
            expected = spearmanr(maps[0][k].flatten(), maps[1][k].flatten()).statistic
            assert found[name] == pytest.approx(expected)


class SignedGradient(Explainer):
    """Changes its sign with the target."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def saliency(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            image = image.clone().requires_grad_()
            logit = self.network(image)[:, 0] * (2 * target - 1)
            (gradient,) = torch.autograd.grad(logit.sum(), image)
        return gradient.mean(1)


def scored(method: str, spearman: list[float], precision: list[float]) -> list[dict[str, object]]:
    """Spearman at the last of two steps and average precision at the first, one per image."""
    facts = {"method": method, "order": "cascading", "group": ""}
    rows: list[dict[str, object]] = []
    for k, (one, two) in enumerate(zip(spearman, precision, strict=True)):
        for step, rank in ((0, 1.0), (1, 0.9), (2, one)):
            layer = f"layer{step}"
            values = {"spearman": rank, "ssim": rank, "dice": rank, "average_precision": two}
            rows += [
                {"id": str(k), **facts, "step": step, "layers": layer, "metric": m, "value": v}
                for m, v in values.items()
            ]
    return rows


@pytest.fixture
def scores() -> pd.DataFrame:
    spread = [0.1, 0.2, 0.3, 0.4]
    rows = scored(RANDOM, [0.0, 0.1, -0.1, 0.0], spread)
    rows += scored("edges", [1.0, 1.0, 1.0, 1.0], [0.8, 0.9, 0.8, 0.9])
    rows += scored("good", [0.1, 0.2, 0.0, 0.1], [0.8, 0.9, 0.8, 0.9])
    rows += scored("noise", [0.2, 0.9, 0.3, 0.8], [0.2, 0.3, 0.2, 0.3])
    rows += scored("kept", [1.0, 1.0, 1.0, 1.0], [0.8, 0.9, 0.8, 0.9])
    return pd.DataFrame(rows)


def test_verdicts_by_hand(scores: pd.DataFrame) -> None:
    judged = verdicts(summary(scores), kept={"kept"}).set_index("method")
    found = judged["verdict"].to_dict()
    assert found == {
        RANDOM: "uninformative",
        "edges": "insensitive",
        "good": "sensitive",
        "noise": "uninformative",
        "kept": "insensitive: kept, not trained for the changed classifier; retrain it",
    }
    assert judged.loc["good", "spearman"] == pytest.approx(0.1)
    assert judged.loc["good", "average precision"] == pytest.approx(0.85)


def test_without_the_random_map_there_is_no_verdict(scores: pd.DataFrame) -> None:
    table = summary(scores[scores["method"] != RANDOM])
    with pytest.raises(ValueError, match="need the control 'Random map'"):
        verdicts(table)


def test_files(scores: pd.DataFrame, tmp_path: Path) -> None:
    write(scores, {"kept"}, tmp_path / "made", "sanity", "steps")
    table = pd.read_csv(tmp_path / "made" / "sanity.csv")
    row = table.query("method == 'good' and step == 2 and metric == 'spearman'").iloc[0]
    assert row["mean"] == pytest.approx(0.1)
    assert row["low"] < row["mean"] < row["high"]
    assert len(pd.read_csv(tmp_path / "made" / "sanity_scores.csv")) == len(scores)
    text = (tmp_path / "made" / "sanity.md").read_text()
    assert "| good | cascading | 0.1 |" in text
    for metric in ("spearman", "ssim", "dice", "average_precision"):
        assert (tmp_path / "made" / f"sanity_{metric}.png").read_bytes().startswith(b"\x89PNG")
