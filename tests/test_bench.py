"""The guard of the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import bench
from benchmarks.training import AsWritten
from classifiers.network import Network
from explainers.learned import Geometry, Single


@pytest.mark.parametrize(("share", "lost"), [(0.6, False), (0.4, True)])
def test_a_ratio_far_below_its_target_fails(
    share: float, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [target * 2 for target in bench.TARGETS.values()]
    found[3] = share * bench.TARGETS["scoring: a numpy loop over percentiles / ours"]
    monkeypatch.setattr(bench, "PARTS", [lambda: found[:3], lambda: found[3:]])
    if lost:
        with pytest.raises(SystemExit, match=r"below 0.5 of the target: \['scoring: a numpy loop"):
            bench.main(tmp_path / "new" / "bench.json", threads=1)
    else:
        bench.main(tmp_path / "new" / "bench.json", threads=1)
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert list(written) == list(bench.TARGETS)
    assert list(written.values()) == found


def test_the_step_as_written_has_the_same_loss_and_gradient() -> None:
    torch.manual_seed(0)
    single = Single(Network("test_resnet"), geometry=Geometry(widths=(4, 8))).eval()
    image, written = torch.rand(3, 1, 32, 32), AsWritten(single)
    found, expected = written.objective(image)[0]["loss"], single.objective(image)[0]["loss"]
    assert_close(found, expected)
    for step in (found, expected):
        step.backward()
    heads = written.explainer.similar_head[-1].weight, single.similar_head[-1].weight
    assert_close(heads[0].grad, heads[1].grad)
