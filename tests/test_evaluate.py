from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from offline import wandb_records
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import evaluate
from classifiers import Network, load_network
from classifiers.randomise import save_network
from datamodules import ImageTable, Phantom, Relabelled
from datamodules.base import Loading
from datamodules.summary import connected_boxes
from explainers import Views, load_explainer
from explainers.attribution import GradCAM, Gradient, SmoothGrad
from explainers.content import source_of
from explainers.evaluation import compare as scoring
from explainers.evaluation import finished
from explainers.evaluation.explorer import Case
from explainers.evaluation.finished import Finished, Maps
from explainers.evaluation.metrics import localisation_scores, min_max
from explainers.evaluation.metrics.localisation import PERCENTILES, score_names
from explainers.evaluation.results import Results
from explainers.evaluation.thresholds import Sweep
from explainers.views import smooth

ROOT = Path(__file__).parents[1]
CONTROLS = {"Random map", "Centred Gaussian", "Mean training mask", "Edge map"}


def phantom() -> Phantom:
    return Phantom(train=24, val=12, test=13, loading=Loading(size=32, batch_size=4))


def compare(classifier: Path, single: Path, out: Path) -> None:
    evaluate.compare(
        phantom(),
        str(classifier),
        {"Single": str(single)},
        {"Gradient": Gradient, "Grad-CAM": lambda network: GradCAM(network, "layer1")},
        Views(count=2),
        (0.0, 0.05),
        out=str(out),
        pictured=4,
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def results(
    phantom_classifier: Path, phantom_single: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("compare")
    compare(phantom_classifier, phantom_single, out)
    return out


def test_every_row_and_no_image_twice(results: Path) -> None:
    scores = Results.read(results).scores
    data = phantom()
    batches = list(data.loader("test"))
    annotated = [
        name for b in batches for name, there in zip(b["id"], b["has_mask"], strict=True) if there
    ]
    precision = scores[scores["metric"] == "average_precision"]
    rows = precision.groupby(["method", "views", "smoothing"])["id"].apply(sorted)
    assert set(rows.index.get_level_values("method")) == CONTROLS | {
        "Single",
        "Gradient",
        "Grad-CAM",
    }
    assert len(rows) == 7 * 2 * 2
    assert all(ids == sorted(annotated) for ids in rows)


def test_scores_are_those_of_the_explainer(results: Path, phantom_single: Path) -> None:
    """Average precision of the smoothed average over views, worked out image by image."""
    tables = Results.read(results)
    cost = tables.costs.set_index(["method", "views"]).loc[("Single", "views")]
    explainer = load_explainer(phantom_single)
    expected = {}
    for batch in phantom().loader("test"):
        for k in batch["has_mask"].nonzero().flatten().tolist():
            maps = explainer.explain(batch["image"][k : k + 1], views=Views(count=2))
            score = localisation_scores(smooth(maps, cost["sigma"]), batch["mask"][k : k + 1])
            expected[batch["id"][k]] = float(score["average_precision"])
    rows = tables.scores.query(
        "method == 'Single' and views == 'views' and smoothing == 'smoothed' "
        "and metric == 'average_precision'"
    )
    found = dict(zip(rows["id"], rows["value"], strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_smoothing_and_percentile_are_chosen_on_validation(
    results: Path, phantom_classifier: Path
) -> None:
    network = load_network(phantom_classifier)
    totals = {sigma: dict.fromkeys(score_names(PERCENTILES), 0.0) for sigma in (0.0, 0.05)}
    for batch in phantom().loader("val"):
        chosen = batch["has_mask"]
        if chosen.any():
            maps = Gradient(network).explain(batch["image"][chosen])
            for sigma, total in totals.items():
                scores = localisation_scores(smooth(maps, sigma), batch["mask"][chosen])
                for name, values in scores.items():
                    total[name] += float(values.sum())
    tables = Results.read(results)
    cost = tables.costs.set_index(["method", "views"]).loc[("Gradient", "plain")]
    best = max(totals, key=lambda sigma: totals[sigma]["average_precision"])
    assert cost["sigma"] == best
    rows = tables.scores.query("method == 'Gradient' and views == 'plain'")
    values = rows.set_index(["smoothing", "metric", "id"])["value"]
    for form, sigma in {"raw": 0.0, "smoothed": best}.items():
        at = max(PERCENTILES, key=lambda p: totals[sigma][f"iou_{p:g}"])
        assert cost[f"percentile_{form}"] == at
        assert values[form, "iou_chosen"].equals(values[form, f"iou_{at:g}"])


def test_long_table(results: Path) -> None:
    table = pd.read_csv(results / "table.csv")
    tables = Results.read(results)
    assert list(table)[:2] == ["method", "views"]
    assert {"metric", "mean", "low", "high", "n"} < set(table)
    row = table.query(
        "method == 'Gradient' and views == 'plain' and smoothing == 'raw' and metric == 'iou_95'"
    ).iloc[0]
    values = tables.scores.query(
        "method == 'Gradient' and views == 'plain' and smoothing == 'raw' and metric == 'iou_95'"
    )["value"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["n"] == len(values)
    assert row["low"] <= row["mean"] <= row["high"]
    classifier = table[table["method"] == "Classifier"].set_index("metric")["mean"]
    assert classifier["accuracy"] == pytest.approx(tables.images["correct"].mean())
    correct = table.query("metric == 'average_precision_correct'")
    right = set(tables.images.loc[tables.images["correct"], "id"]) & set(values.index.map(str))
    assert len(right) == 0 or (correct["n"] <= len(values)).all()


def test_the_users_columns_do_not_replace_ours(phantom_classifier: Path) -> None:
    """A table whose own label is finer than the classes, with a group column as BUSI's."""
    network = load_network(phantom_classifier)
    batch = next(iter(phantom().loader("test")))
    one = {"label": "benign", "group": "g", "correct": "no", "p_id": "7", "seed": "3"}
    batch["columns"] = {name: [value] * len(batch["id"]) for name, value in one.items()}
    groups = dict.fromkeys(batch["id"], "patient")
    table = scoring.classified(network, [batch], groups, torch.device("cpu"))
    assert set(table["label"]) <= {"healthy", "opacity"}
    assert set(table["group"]) == {"patient"}
    assert (table["correct"] == (table["label"] == table["decision"])).all()
    for name, value in one.items():
        assert set(table[name if name == "p_id" else f"table_{name}"]) == {value}


def test_peak_memory_is_that_of_the_call() -> None:
    """50 MB taken inside; what was freed before does not hide them."""
    cost, image = scoring.Cost(), torch.zeros(2, 1)
    for _ in range(2):
        with scoring.measured(cost, image):
            torch.ones(50 * 2**18).sum()
    assert cost.images == 4
    assert 45 < cost.megabytes < 100
    small = scoring.Cost()
    with scoring.measured(small, image):
        torch.ones(2**18).sum()
    assert small.megabytes < 10


def test_smoothing_without_annotated_validation_images_is_refused() -> None:
    with pytest.raises(ValueError, match="none of its images has a mask"):
        scoring.choose(lambda image, cost: image[:, 0], [], (0.0, 0.05))
    with pytest.raises(ValueError, match=r"at least one sigma .* but got \[\]"):
        scoring.choose(lambda image, cost: image[:, 0], [], ())
    assert scoring.choose(lambda image, cost: image[:, 0], [], (0.02,)) == (0.02, {})


def test_kept_and_flipped_per_decided_class(results: Path, phantom_single: Path) -> None:
    explainer = load_explainer(phantom_single)
    network, kept = explainer.network, []
    for batch in phantom().loader("test"):
        with torch.no_grad():
            similar, _ = explainer(batch["image"])
            kept += (network.decide(similar) == network.decide(batch["image"])).tolist()
    scores = Results.read(results).scores
    assert scores.query("metric == 'kept'")["value"].mean() == pytest.approx(np.mean(kept))
    per_class = scores[scores["metric"].isin(["kept_healthy", "kept_opacity"])]
    assert len(per_class) == len(kept)
    table = pd.read_csv(results / "table.csv").query("method == 'Single'")
    assert {"auc_similar", "auc_adversarial"} < set(table["metric"])
    assert not table["metric"].str.startswith("p_").any()


def test_page_stands_alone_and_shows_pictures(results: Path) -> None:
    page = BeautifulSoup((results / "report.html").read_text(), "html.parser")
    images = page.find_all("img")
    # outlined image, similar, adversarial, and map and top 5 % of the three methods; three plots
    assert len(images) == 2 * (1 + 2 + 3 * 2) + 3
    for image in images:
        prefix, data = str(image["src"]).split(",", 1)
        assert prefix == "data:image/png;base64"
        assert Image.open(BytesIO(base64.b64decode(data))).width >= 160
    assert not page.find_all("link")
    assert not page.find_all(src=re.compile("^(?!data:)"))
    assert len(page.find_all("script", class_="x-packed")) == 4  # two without a mask
    index = json.loads(page.find("script", id="x-index").text)
    assert index["methods"] == ["Single", "Gradient", "Grad-CAM"]
    assert sum("average_precision" in one["scores"]["Grad-CAM"] for one in index["cases"]) == 2
    cells = [cell.text for cell in page.find_all("td")]
    assert "Grad-CAM" in cells
    assert "Mean training mask" in cells


def test_two_processes_give_the_scores_of_one(
    results: Path, phantom_classifier: Path, phantom_single: Path, tmp_path: Path
) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text(f"""
data:
  class_path: datamodules.Phantom
  init_args: {{train: 24, val: 12, test: 13, loading: {{size: 32, batch_size: 4}}}}
classifier: {phantom_classifier}
explainers: {{Single: {phantom_single}}}
methods:
  Gradient: {{class_path: explainers.attribution.Gradient}}
  Grad-CAM: {{class_path: explainers.attribution.GradCAM, init_args: {{layer: layer1}}}}
views: {{count: 2}}
smoothing: [0, 0.05]
out: {tmp_path / "out"}
pictured: 2
""")
    command = [sys.executable, "evaluate.py", "compare", "--config", str(config)]
    command += ["--devices", "2", "--accelerator", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    key = ["id", "method", "views", "smoothing", "metric"]
    one, two = (
        Results.read(folder).scores.set_index(key)["value"].sort_index()
        for folder in (results, tmp_path / "out")
    )
    assert one.index.equals(two.index)
    # convolutions of another batch size round differently; the maps differ by about 1e-7, which
    # may exchange two neighbouring pixels of a ranking
    np.testing.assert_allclose(one, two, atol=2e-3)
    assert (one - two).abs().mean() < 1e-4


def test_an_interrupted_comparison_goes_on(
    results: Path,
    phantom_classifier: Path,
    phantom_single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in its fourth row of 14: three are kept, and the scores are those of one go."""
    computed: list[str] = []

    def stopped(row: dict[str, str], *arguments: Any) -> Any:
        computed.append(row["method"])
        if len(computed) == 4:
            raise KeyboardInterrupt
        return score_maps(row, *arguments)

    score_maps = scoring.score_maps
    monkeypatch.setattr(scoring, "score_maps", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(phantom_classifier, phantom_single, tmp_path)
    assert len(list((tmp_path / "finished").iterdir())) == 3
    compare(phantom_classifier, phantom_single, tmp_path)
    assert len(computed) == 4 + 11
    pd.testing.assert_frame_equal(Results.read(tmp_path).scores, Results.read(results).scores)


class Counted(Gradient):
    """Gradient that remembers which images it explained, and can be stopped."""

    seen: ClassVar[list[str]] = []
    stop: ClassVar[int] = 1000

    def saliency(self, image: Tensor, target: Tensor) -> Tensor:
        if len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        self.seen.extend(sha256(one.numpy().tobytes()).hexdigest() for one in image)
        return super().saliency(image, target)


def test_a_slow_map_is_computed_once(
    phantom_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again after a stop within a row, for other limits, nor for the page."""
    arguments: Any = {"methods": {"Counted": Counted}, "smoothing": (0.0, 0.05)}
    arguments |= {"accelerator": "cpu", "pictured": 0}
    run = partial(evaluate.compare, phantom(), str(phantom_classifier), **arguments)
    run(out=str(tmp_path / "fast"))
    assert not (tmp_path / "fast" / "maps").exists()
    assert (before := len(Counted.seen)) > 8
    Counted.seen.clear()
    monkeypatch.setattr(finished, "SLOW", 0.0)
    slow = partial(run, out=str(tmp_path / "slow"))
    monkeypatch.setattr(Counted, "stop", 8)
    with pytest.raises(KeyboardInterrupt):
        slow()
    monkeypatch.undo()
    monkeypatch.setattr(finished, "SLOW", 0.0)
    assert 8 <= len(Counted.seen) < before
    slow(limits={"Counted": scoring.Limit(plain=3)})
    slow()
    assert len(Counted.seen) == len(set(Counted.seen)) == before
    fast_scores, slow_scores = (Results.read(tmp_path / name).scores for name in ("fast", "slow"))
    pd.testing.assert_frame_equal(slow_scores, fast_scores)
    slow(pictured=8)
    assert len(Counted.seen) == len(set(Counted.seen)) == before + 4  # of eight, without evidence


def test_what_a_kept_map_took_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "SLOW", 0.0)
    explainer, image = Gradient(Network("test_resnet")), torch.rand(3, 3, 32, 32)
    costs = scoring.Cost(), scoring.Cost()
    first, again = (Maps(tmp_path, explainer)(image, cost) for cost in costs)
    assert torch.equal(first, again)
    assert costs[0].images == costs[1].images == 3
    assert costs[1].seconds == pytest.approx(costs[0].seconds)
    assert costs[1].megabytes == costs[0].megabytes
    damaged = next(tmp_path.glob("*/*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read .* computed anew"):
        assert_close(Maps(tmp_path, explainer)(image, scoring.Cost()), first)
    other = [
        Maps(tmp_path, explainer, Views(count=2)),
        Maps(tmp_path, SmoothGrad(explainer.network)),
    ]
    assert len({maps.folder for maps in (*other, Maps(tmp_path, explainer))}) == 3
    assert Maps(tmp_path, Gradient(Network("test_resnet"))).folder not in (other[0].folder, None)


def test_a_finished_row_is_found_by_all_that_it_follows_from(tmp_path: Path) -> None:
    network, views = Network("test_resnet"), Views(count=2)
    path = Finished(tmp_path, "data", views).path(Gradient(network))
    assert path == Finished(tmp_path, "data", Views(count=2)).path(Gradient(network))
    others = [
        Finished(tmp_path, "other", views).path(Gradient(network)),
        Finished(tmp_path, "data", Views(count=3)).path(Gradient(network)),
        Finished(tmp_path, "data", views).path(SmoothGrad(network)),
        Finished(tmp_path, "data", views).path(SmoothGrad(network, samples=24)),
        Finished(tmp_path, "data", views).path(Gradient(Network("test_resnet"))),
    ]
    assert len({path, *others}) == 6
    batch = next(iter(phantom().loader("test")))
    pixels, masks = batch["image"] * 0.99, ~batch["mask"]
    changed = [batch, {**batch, "image": pixels}, {**batch, "mask": masks}]
    assert len({tuple(scoring.digest([one])) for one in changed}) == 3
    assert Finished(tmp_path).path(lambda: 1) is None


def test_the_source_counts_as_far_as_a_method_follows_from_it() -> None:
    name = "explainers.attribution."
    texts = {
        module: (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for module in (f"{name}gradient", f"{name}scores", f"{name}cam", "explainers.views")
    }
    plain, cam = source_of(SmoothGrad), source_of(GradCAM)
    for module, text in texts.items():
        assert (text in plain) == (module != f"{name}cam"), module
        assert (text in cam) == (module != f"{name}gradient"), module
    scored = source_of(GradCAM, "explainers.evaluation.compare")
    metrics = ROOT / "explainers" / "evaluation" / "metrics" / "localisation.py"
    assert metrics.read_text() in scored


def test_a_limit_scores_the_same_few_images_whatever_their_order(
    phantom_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_on, choose = {}, scoring.choose

    def counting(explained: Any, batches: Any, candidates: Any) -> scoring.Choice:
        batches = list(batches)
        key = type(explained.explainer), bool(explained.views)
        chosen_on[key] = sum(len(batch["id"]) for batch in batches)
        return choose(explained, batches, candidates)

    monkeypatch.setattr(scoring, "choose", counting)
    limits = {"Gradient": scoring.Limit(views=3, validation=4)}
    evaluate.compare(
        phantom(),
        str(phantom_classifier),
        methods={"Gradient": Gradient, "SmoothGrad": lambda f: SmoothGrad(f, samples=2)},
        views=Views(count=2),
        smoothing=(0.0,),
        limits=limits,
        reference="SmoothGrad",
        out=str(tmp_path),
        pictured=0,
        accelerator="cpu",
    )
    scores = Results.read(tmp_path).scores.query("metric == 'average_precision'")
    ids = scores.groupby(["method", "views"])["id"].apply(set)
    everything = ids["SmoothGrad", "views"]
    assert ids["Gradient", "plain"] == everything
    assert len(everything) > 3
    assert (chosen_on[Gradient, False], chosen_on[Gradient, True]) == (4, 3)
    assert chosen_on[SmoothGrad, False] == chosen_on[SmoothGrad, True] > 4
    backwards = list(phantom().loader("test"))[::-1]
    assert ids["Gradient", "views"] == set(scoring.drawn(backwards, 3) or [])
    table = (tmp_path / "table.md").read_text().splitlines()
    (row,) = (line for line in table if line.startswith("| Gradient | views | raw"))
    assert "| 3 |" in row
    assert "AP minus reference (SmoothGrad, " in (tmp_path / "table.tex").read_text()
    assert "<h2>Explorer" not in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"limits name \['RISE'\]"):
        evaluate.checked_limits({"RISE": scoring.Limit(4)}, [])


def test_an_unknown_reference_lists_the_methods(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference 'RISE' is none of \['Single'"):
        evaluate.pool([str(results)], str(tmp_path), "RISE")


def test_the_example_of_a_new_method_is_compared(
    phantom_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, preset = re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 15
    (tmp_path / "contrast.py").write_text(code)
    data = "{class_path: datamodules.Phantom, init_args: {train: 9, val: 8, test: 9, "
    data += "loading: {size: 32, batch_size: 4}}}"
    rest = f"data: {data}\nclassifier: {phantom_classifier}\nout: {tmp_path}/out\npictured: 1\n"
    (tmp_path / "compare.yaml").write_text(preset + rest)
    command = [sys.executable, "evaluate.py", "compare", "--config", f"{tmp_path}/compare.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    scores = Results.read(tmp_path / "out").scores
    assert (scores["method"] == "Contrast").any()


def test_pool_takes_the_mean_over_seeds(results: Path, tmp_path: Path) -> None:
    other = Results.read(results)
    other.scores["value"] += 0.5
    other.write(tmp_path / "other")
    evaluate.pool([str(results), str(tmp_path / "other")], str(tmp_path / "pooled"))
    key = ["method", "views", "smoothing", "metric"]
    first, pooled = (
        pd.read_csv(folder / "table.csv").set_index(key)
        for folder in (results, tmp_path / "pooled")
    )
    rows = first.index.get_level_values("metric") == "average_precision"
    difference = (pooled["mean"] - first["mean"])[rows]
    np.testing.assert_allclose(difference, 0.25)
    assert (pooled["n"] == first["n"])[rows].all()


def test_pool_puts_folds_together(results: Path, tmp_path: Path) -> None:
    """The images cut into two folds are the images, whole ones and halves are refused."""
    whole = Results.read(results)
    for k, part in enumerate((slice(0, 6), slice(6, None))):
        chosen = set(whole.images["id"].iloc[part])
        Results(
            whole.scores[whole.scores["id"].isin(chosen)],
            whole.images[whole.images["id"].isin(chosen)],
            whole.costs,
        ).write(tmp_path / str(k))
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    evaluate.pool(folders, str(tmp_path / "pooled"))
    key = ["method", "views", "smoothing", "metric"]
    one, two = (
        pd.read_csv(folder / "table.csv").set_index(key).sort_index()
        for folder in (results, tmp_path / "pooled")
    )
    assert one["mean"].to_dict() == pytest.approx(two["mean"].to_dict(), nan_ok=True)
    assert one["n"].equals(two["n"])
    with pytest.raises(ValueError, match=r"same images \(seeds\) or none in common \(folds\)"):
        evaluate.pool([str(results), folders[0]], str(tmp_path / "pooled"))


def test_pool_wants_the_same_methods(results: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(results, fewer)
    scores = pd.read_csv(fewer / "scores.csv")
    scores[scores["method"] != "Edge map"].to_csv(fewer / "scores.csv", index=False)
    with pytest.raises(ValueError, match=r"\['Edge map'\] are not in all of .*fewer'\]; compare"):
        evaluate.pool([str(results), str(fewer)], str(tmp_path / "pooled"))


def test_pool_names_a_folder_without_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no scores\.csv"):
        evaluate.pool([str(tmp_path)], str(tmp_path / "out"))


def test_another_classifier_is_refused(phantom_classifier: Path, phantom_single: Path) -> None:
    network = load_network(phantom_classifier)
    with torch.no_grad():
        network.backbone.fc.bias.add_(1)
    with pytest.raises(ValueError, match="'Single' was trained for another classifier"):
        evaluate.same_classifier(load_explainer(phantom_single), network, "Single")


def test_other_classes_are_refused(phantom_classifier: Path) -> None:
    data = phantom()
    data.class_names = ("clear", "dense")
    with pytest.raises(ValueError, match=r"trained on classes .*'healthy', 'opacity'.*'clear'"):
        evaluate.compare(data, str(phantom_classifier), accelerator="cpu")


def test_paper_beside_published_values(results: Path, tmp_path: Path) -> None:
    """The demo's two rows under the paper's names."""
    own = Results.read(results)
    names = {"Single": "Single_2 (W, TV)", "Grad-CAM": "Grad-CAM, last layer"}
    for part in (own.scores, own.costs):
        part["method"] = part["method"].replace(names)
    own.write(tmp_path)
    evaluate.paper(phantom(), str(tmp_path))
    table = pd.read_csv(tmp_path / "table.csv").query("smoothing == 'raw'")
    table = table.set_index(["method", "views", "metric"])["mean"]
    cells = pd.read_csv(tmp_path / "paper.csv", keep_default_na=False, na_values={"mean": [""]})
    run = cells[cells["mean"].notna() & (cells["table"] != "III")]
    assert set(run["table"]) == {"IV", "V", "VI", "VII", "VIII", "IX", "X", "XI"}
    for cell in run[run["metric"] != "seconds"].itertuples():
        assert cell.mean == table[cell.method, cell.views, cell.metric]
    heights = [box[3] - box[1] for box in boxes_of_test_images()]
    sizes = cells.query("table == 'III' and metric == 'height'").set_index("method")["mean"]
    assert sizes["max"] == max(heights)
    assert sizes["mean"] == pytest.approx(np.mean(heights))
    assert "| Single_2 (W, TV) | plain |" in (tmp_path / "paper.md").read_text()


def boxes_of_test_images() -> list[tuple[int, int, int, int]]:
    masks = [batch["mask"][batch["has_mask"]] for batch in phantom().loader("test")]
    return [box for mask in torch.cat(masks) for box in connected_boxes(mask)]


def test_tables_and_plots_in_wandb(results: Path, tmp_path: Path) -> None:
    """A pool of one seed, logged offline."""
    evaluate.pool([str(results)], str(tmp_path), logging="wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged = file.parent / "files" / "media"
    tables = {path.name.rsplit("_", 2)[0] for path in (logged / "table").iterdir()}
    assert tables == {"Localisation", "Generated images", "Classifier", "Long form"}
    (long,) = (logged / "table").glob("Long form*")
    content = json.loads(long.read_text())
    assert content["columns"] == list(pd.read_csv(tmp_path / "table.csv"))
    assert len(content["data"]) == len(pd.read_csv(tmp_path / "table.csv"))
    plots = {path.name.rsplit("_", 2)[0] for path in (logged / "images").iterdir()}
    assert plots == {path.stem for path in tmp_path.glob("*.png")}


def test_maps_and_the_report_in_wandb(results: Path, tmp_path: Path) -> None:
    shutil.copy(results / "table.csv", tmp_path)
    image, mask = torch.rand(3, 8, 8), torch.ones(8, 8, dtype=torch.bool)
    facts = {"label": "ill", "decision": "well"}
    case = Case("scan", facts, image, mask, {"Single": image[0]}, {}, {})
    evaluate.log_to_wandb(tmp_path, {}, [str(results / "nowhere.ckpt")], [case], "the page")
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (maps,) = log.parent.glob("files/media/table/Maps*")
    content = json.loads(maps.read_text())
    assert content["columns"] == ["id", "label", "decision", "image", "Single"]
    assert content["data"][0][:3] == ["scan", "ill", "well"]
    artifacts = [
        r.artifact for r in wandb_records(log) if r.WhichOneof("record_type") == "artifact"
    ]
    held = {one.type: [entry.path for entry in one.manifest.contents] for one in artifacts}
    assert held["report"] == ["report.html", "table.csv"]
    assert not (tmp_path / "report.html").exists()
    pictures = [path for path in held["run_table"] if path.endswith(".png")]
    assert len(pictures) == 2


@pytest.mark.parametrize(
    "preset",
    sorted((ROOT / "configs").glob("*/compare*.yaml")),
    ids=lambda p: "/".join(p.parts[-2:]),
)
def test_presets_of_compare_are_understood(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["compare", "--config", str(preset), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(preset.read_text())
    assert list(printed["methods"]) == list(given["methods"])
    entries = {*given.get("explainers", {}), *given["methods"]}
    assert set(given.get("limits", {})) <= entries
    assert given.get("reference", "Gradient") in entries
    assert preset.read_text().splitlines()[1] == (
        f"# python evaluate.py compare --config {preset.relative_to(ROOT)}"
    )


COMMANDS = ("sanity", "label_randomisation", "repeatability", "thresholds", "agreement", "quality")


@pytest.mark.parametrize(
    "preset",
    sorted(path for name in COMMANDS for path in (ROOT / "configs").glob(f"*/{name}.yaml")),
    ids=lambda p: "/".join(p.parts[-2:]),
)
def test_presets_of_the_studies_are_understood(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([preset.stem, "--config", str(preset), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert list(printed["methods"]) == list(yaml.safe_load(preset.read_text())["methods"])
    assert preset.read_text().splitlines()[1] == (
        f"# python evaluate.py {preset.stem} --config {preset.relative_to(ROOT)}"
    )


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "configs").glob("*/paper.yaml")), ids=lambda p: p.parts[-2]
)
def test_presets_of_paper_read_what_compare_writes(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["paper", "--config", str(preset), "--print_config"])
    assert stop.value.code == 0
    folder = yaml.safe_load(capsys.readouterr().out)["folder"]
    written = [yaml.safe_load(path.read_text())["out"] for path in preset.parent.glob("compare*")]
    assert folder in written


def sanity_arguments(classifier: Path) -> dict[str, Any]:
    return {
        "data": phantom(),
        "classifier": str(classifier),
        "methods": {"Gradient": Gradient, "Grad-CAM": partial(GradCAM, layer="layer1")},
        "accelerator": "cpu",
        "images": 4,
    }


def test_sanity_with_kept_and_retrained_explainers(
    train: Callable[..., None], phantom_classifier: Path, phantom_single: Path, tmp_path: Path
) -> None:
    random = tmp_path / "random.ckpt"
    evaluate.randomise(str(phantom_classifier), str(random), seed=2)
    config = yaml.safe_load((phantom_single.parent / "config.yaml").read_text())
    preset = {key: config[key] for key in ("model", "data")}
    preset["model"]["init_args"]["network"] = str(random)
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    small = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--logging", "off"]
    train("fit", "-c", tmp_path / "preset.yaml", "--out", tmp_path / "single", *small)
    arguments = sanity_arguments(phantom_classifier) | {
        "explainers": {"Single": str(phantom_single)},
        "retrained": {"Single": str(tmp_path / "single" / "last.ckpt")},
    }
    evaluate.sanity(str(tmp_path / "out"), steps=2, seed=2, **arguments)
    scores = pd.read_csv(tmp_path / "out" / "sanity_scores.csv")
    assert scores["id"].nunique() == 4
    spearman = scores[scores["metric"] == "spearman"].set_index(["method", "order", "step"])
    kept = spearman.loc[("Single", "cascading"), "value"]
    assert kept.tolist() == pytest.approx([1] * 12)
    assert spearman.loc[("Edge map", "cascading", 2), "value"].tolist() == pytest.approx([1] * 4)
    assert (spearman.loc[("Single", "retrained", 1), "value"] < 0.99).all()
    assert (spearman.loc[("Gradient", "cascading", 2), "value"] < 0.99).all()
    text = (tmp_path / "out" / "sanity.md").read_text()
    assert "kept, not trained for the changed classifier" in text
    with pytest.raises(ValueError, match=r"retrained names \['Duo'\], which explainers does not"):
        evaluate.sanity(str(tmp_path / "out"), **arguments | {"retrained": {"Duo": "x.ckpt"}})
    with pytest.raises(ValueError, match="'Single' was trained for another classifier"):
        evaluate.sanity(str(tmp_path / "out"), steps=2, seed=3, **arguments)


def test_label_randomisation_trains_once(phantom_classifier: Path, tmp_path: Path) -> None:
    arguments = sanity_arguments(phantom_classifier)
    evaluate.label_randomisation(str(tmp_path), accuracy=0.9, max_epochs=40, **arguments)
    written = tmp_path / "classifier.ckpt"
    relabelled, data = load_network(written), Relabelled(phantom())
    batches = list(data.loader("train"))
    right = [relabelled.decide(batch["image"]) == batch["label"] for batch in batches]
    assert torch.cat(right).float().mean() >= 0.9
    scores = pd.read_csv(tmp_path / "label_randomisation_scores.csv")
    assert set(scores["order"]) == {"labels"}
    gradient = scores.query("method == 'Gradient' and metric == 'spearman' and step == 1")
    assert (gradient["value"] < 0.99).all()
    time = written.stat().st_mtime_ns
    evaluate.label_randomisation(str(tmp_path), **arguments)
    assert written.stat().st_mtime_ns == time


def test_repeatability_of_two_architectures(
    phantom_classifier: Path, phantom_single: Path, tmp_path: Path
) -> None:
    """The trained classifier, itself drawn anew, and another architecture."""
    evaluate.randomise(str(phantom_classifier), str(tmp_path / "again.ckpt"))
    other = Network("mobilenet_v2", class_names=["healthy", "opacity"])
    save_network(other, tmp_path / "other.ckpt")
    evaluate.repeatability(
        {
            "resnet18": [str(phantom_classifier), str(tmp_path / "again.ckpt")],
            "mobilenet_v2": [str(tmp_path / "other.ckpt")],
        },
        {"Single": {"resnet18": [str(phantom_single), str(phantom_single)]}},
        str(tmp_path / "out"),
        data=phantom(),
        methods={"Gradient": Gradient},
        images=3,
        accelerator="cpu",
    )
    scores = pd.read_csv(tmp_path / "out" / "repeatability_scores.csv")
    spearman = scores[scores["metric"] == "spearman"].groupby(["method", "pair"])["value"]
    assert spearman.count().to_dict() == {
        ("Edge map", "between"): 6,
        ("Edge map", "within"): 3,
        ("Gradient", "between"): 6,
        ("Gradient", "within"): 3,
        ("Random map", "between"): 6,
        ("Random map", "within"): 3,
        ("Single", "within"): 3,
    }
    assert spearman.min()["Single", "within"] == pytest.approx(1)
    assert spearman.min()["Edge map", "between"] == pytest.approx(1)
    assert spearman.max()["Gradient", "within"] < 0.99


def test_thresholds_of_features_and_their_union(phantom_classifier: Path, tmp_path: Path) -> None:
    """Scores worked out image by image; a table with two kinds of evidence."""
    table = feature_table(tmp_path)
    loading = Loading(size=32, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMADV_DATA", str(tmp_path))
        classes = {"healthy": ["0"], "opacity": ["1"]}
        features = ["left", "right"]
        data = ImageTable(table.name, classes, features=features, loading=loading)
        evaluate.thresholds(
            str(tmp_path / "out"),
            sweep=Sweep(("map",), (0.3, 0.6)),
            data=data,
            classifier=str(phantom_classifier),
            methods={"Gradient": Gradient},
            images=0,
            accelerator="cpu",
        )
    scores = pd.read_csv(tmp_path / "out" / "thresholds_scores.csv")
    assert set(scores["feature"]) == {"left", "right", "union"}
    network = load_network(phantom_classifier)
    for batch in data.loader("test"):
        maps = min_max(Gradient(network).explain(batch["image"]))
        decided = network.decide(batch["image"])
        for k in batch["has_mask"].nonzero().flatten().tolist():
            rows = scores[(scores["id"] == batch["id"][k]) & (scores["method"] == "Gradient")]
            assert (rows["correct"] == bool(decided[k] == batch["label"][k])).all()
            masks = [*batch["features"][k], batch["mask"][k]]
            for name, mask in zip(("left", "right", "union"), masks, strict=True):
                found = rows[(rows["feature"] == name) & (rows["threshold"] == 0.6)]["jaccard"]
                kept = maps[k] >= 0.6
                expected = [(kept & mask).sum().item() / (kept | mask).sum().item()]
                assert found.tolist() == pytest.approx(expected * bool(mask.any()))
    assert set(pd.read_csv(tmp_path / "out" / "best_thresholds.csv")["feature"]) == {
        "left",
        "right",
        "union",
    }


def feature_table(folder: Path) -> Path:
    """Phantoms as files, their evidence cut into a left and a right half."""
    lines = ["image,label,split,mask_left,mask_right"]
    data = phantom()
    for split in ("train", "val", "test"):
        for batch in data.loader(split):  # type: ignore[arg-type]
            for k, name in enumerate(batch["id"]):
                pixels = (batch["image"][k, 0] * 255).round().byte().numpy()
                Image.fromarray(pixels).save(folder / f"{name}.png")
                cells = []
                for side, part in (("left", slice(0, 16)), ("right", slice(16, 32))):
                    mask = torch.zeros(32, 32).bool()
                    mask[:, part] = batch["mask"][k][:, part]
                    cells.append(f"{name}-{side}.png" if mask.any() else "")
                    if mask.any():
                        Image.fromarray(mask.byte().numpy() * 255).save(folder / cells[-1])
                label = int(batch["label"][k])
                lines.append(",".join([f"{name}.png", str(label), split, *cells]))
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


def test_quality_is_every_metric_of_the_maps(
    phantom_classifier: Path,
    phantom_single: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Some of the metrics worked out again from the maps, image by image."""
    arguments = sanity_arguments(phantom_classifier) | {"methods": {"Gradient": Gradient}}
    learned = {"Single": str(phantom_single)}
    evaluate.quality(str(tmp_path), **arguments, explainers=learned)
    assert "Scoring: Gradient, 1 of 4 done" in capsys.readouterr().out  # in a log, without a bar
    scores = pd.read_csv(tmp_path / "quality_scores.csv")
    assert set(scores["method"]) == {"Gradient", "Edge map", "Random map", "Single"}
    assert scores["metric"].nunique() == 11 + 8 + 2 + 3
    assert scores.groupby(["method", "metric"])["id"].nunique().eq(4).all()
    assert scores["value"].notna().all()
    network = load_network(phantom_classifier)
    rows = scores[scores["method"] == "Gradient"].set_index(["id", "metric"])["value"]
    checked = 0
    for batch in phantom().loader("test"):
        for k, name in enumerate(batch["id"]):
            if name not in set(scores["id"]):
                continue
            image, mask = batch["image"][k : k + 1], batch["mask"][k : k + 1]
            saliency = Gradient(network).explain(image)
            p = network(image).sigmoid()[0, 0]
            sign = 1 if network.decide(image)[0] else -1
            dark = network(image * (1 - min_max(saliency)[:, None])).sigmoid()[0, 0]
            before, after = (float(v.detach() if sign > 0 else 1 - v.detach()) for v in (p, dark))
            drop = 100 * max(0.0, before - after) / before
            assert rows[name, "drop_relevant_soft"] == pytest.approx(drop, abs=1e-3)
            mass = float(saliency[mask].sum() / saliency.sum())
            assert rows[name, "relevance_mass"] == pytest.approx(mass, rel=1e-4)
            checked += 1
    assert checked == 4
    table = pd.read_csv(tmp_path / "quality.csv").set_index(["method", "metric"])
    assert table.loc[("Gradient", "road"), "n"] == 4
    assert 0 < table.loc[("Gradient", "pixel_average_precision"), "mean"] < 1
    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert lines[0].startswith("| metric | Gradient |")
    assert len(lines) == 2 + 25
    assert "nan" not in lines[-1]


def test_agreement_shows_the_extremes(
    results: Path, phantom_classifier: Path, phantom_single: Path, tmp_path: Path
) -> None:
    def run(method: str, **options: Any) -> None:
        evaluate.agreement(
            str(results),
            ["decision", "correct", "confidence"],
            method,
            out=str(tmp_path),
            pictured=2,
            explainers={"Single": str(phantom_single)},
            **sanity_arguments(phantom_classifier),
            **options,
        )

    run("Single", smoothing="smoothed", case="id")
    cases, images = (pd.read_csv(tmp_path / f"agreement{end}.csv") for end in ("_cases", ""))
    assert cases["mean"].tolist() == pytest.approx(images["mean"].tolist())
    assert cases["images"].tolist() == images["images"].tolist()
    assert "Cases by group" in (tmp_path / "agreement.html").read_text()
    scores = Results.read(results).scores
    row = scores.query(
        "method == 'Single' and views == 'plain' and smoothing == 'smoothed' "
        "and metric == 'average_precision'"
    ).set_index("id")["value"]
    table = pd.read_csv(tmp_path / "agreement.csv")
    cells = table.query("method == 'Single' and views == 'plain' and smoothing == 'smoothed'")
    for column in set(cells["column"]):
        part = cells[cells["column"] == column]
        assert part["images"].sum() == len(row)
        assert (part["mean"] * part["n"]).sum() == pytest.approx(row.sum())
    page = (tmp_path / "agreement.html").read_text()
    for name in (row.idxmax(), row.idxmin()):
        assert f"{name}: {row[name]:.3f}" in page
    assert page.count("data:image/png") == 2 * 4
    with pytest.raises(ValueError, match=r"row \('Duo', 'plain', 'raw'\) has no"):
        run("Duo")


def test_an_error_names_its_row(phantom_classifier: Path, tmp_path: Path) -> None:
    """While a method is built, and while it explains: maps of one position at 32 px."""
    arguments = sanity_arguments(phantom_classifier)
    wrong = arguments | {"methods": {"CAM, blocks.4": partial(GradCAM, layer="blocks.4")}}
    with pytest.raises(ValueError, match=r"row 'CAM, blocks\.4': the backbone has no layer"):
        evaluate.quality(str(tmp_path), **wrong)
    last = arguments | {"methods": {"CAM, last": GradCAM}}
    for command in (evaluate.quality, evaluate.thresholds, evaluate.sanity):
        with pytest.raises(ValueError, match=r"row 'CAM, last': there is no last layer"):
            command(str(tmp_path), **last)
    with pytest.raises(ValueError, match=r"row 'CAM, last': there is no last layer"):
        evaluate.compare(
            arguments["data"],
            str(phantom_classifier),
            methods={"CAM, last": GradCAM},
            out=str(tmp_path / "compare"),
            accelerator="cpu",
        )
