"""The command in a process of its own: shapes are not checked where a graph is traced."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from highdicom.seg import segread
from offline import wandb_records
from PIL import Image
from pydicom import dcmread

from datamodules import Phantom
from datamodules.base import Loading, data_root
from explainers import MaskGenerator, load_explainer
from explainers.__main__ import explain, export, main
from explainers.views import Views

ROOT = Path(__file__).parents[2]
REAL = sorted((data_root() / "dicom").glob("*.dcm"))
DATA = {"train": 96, "val": 15, "test": 13, "loading": {"size": 32, "batch_size": 4}}


@pytest.fixture(scope="module")
def exported(phantom_single: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed lines of an export with views."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"class_path": "datamodules.Phantom", "init_args": DATA})
    )
    command = [sys.executable, "-m", "explainers", "export", str(phantom_single)]
    command += ["--data", str(folder / "data.yaml"), "--out", str(folder), "--smoothing", "0.05"]
    command += ["--views", "{count: 3}", "--images", "8", "--logging", "wandb"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_all_files_and_their_parity(exported: tuple[Path, str]) -> None:
    folder, printed = exported
    found = re.findall(r"^(\S+): largest difference of the map (\S+), decisions", printed, re.M)
    names = ["checkpoint", "model.pt2", "model.onnx", "model_fp16.onnx", "model_int8.onnx"]
    assert [name for name, _ in found] == names
    assert float(found[2][1]) < 1e-4
    assert all((folder / name).is_file() for name in names[1:])
    assert "decisions that differ 0 of 8" in printed.splitlines()[-1]  # int8 spares the classifier
    sizes = [(folder / name).stat().st_size for name in names[2:]]
    assert sizes[0] > sizes[2] > sizes[1]  # most weights are the classifier's
    card = json.loads((folder / "card.json").read_text())
    assert card["largest_difference_of_map"]["model.onnx"] < 1e-4
    assert card["views"]["count"] == 3
    assert card["input"] == {"shape": ["batch", 1, 32, 32], "range": [0, 1]}
    assert card["classifier"]["class_names"] == ["healthy", "opacity"]
    assert set(card["validation_average_precision"]) == set(names)
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [one for one in wandb_records(log) if one.WhichOneof("record_type") == "artifact"]
    (artifact,) = [one.artifact for one in records]
    held = {entry.path for entry in artifact.manifest.contents}
    assert held == {*names[1:], "card.json", "card.md"}
    text = (folder / "card.md").read_text()
    assert "Not a medical device" in text
    assert "| class_names |" in text


def test_the_readme_needs_nothing_of_this_project(
    exported: tuple[Path, str], phantom_single: Path, tmp_path: Path
) -> None:
    """The snippet, in a folder of its own, gives the map of the checkpoint."""
    readme = (ROOT / "README.md").read_text()
    snippet = readme.split("<!-- exported model -->\n```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 24
    (tmp_path / "snippet.py").write_text(snippet + "\nnp.save('heat.npy', answer['map'][0])\n")
    batch = next(iter(Phantom(test=3, loading=Loading(size=32)).loader("test")))
    pixels = (batch["image"][0, 0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    command = [sys.executable, "-I", "snippet.py", str(exported[0] / "model.onnx"), "image.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    image = torch.from_numpy(pixels)[None, None].float() / 255
    explainer = load_explainer(phantom_single)
    expected = explainer.explain(image, views=Views(count=3), smoothing=0.05)[0]
    found = torch.from_numpy(np.load(tmp_path / "heat.npy"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert f"class {int(explainer.network.decide(image))}" in done.stdout
    assert Image.open(tmp_path / "map.png").size == (32, 32)


def test_files_explained_by_the_exported_model(
    exported: tuple[Path, str],
    phantom_single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by the checkpoint with the same views and smoothing."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(tmp_path / "image.png")
    inputs = [str(tmp_path / "image.png")]
    assert explain(str(exported[0] / "model.onnx"), inputs, str(tmp_path / "onnx")) == []
    views = Views(count=3)
    explain(str(phantom_single), inputs, str(tmp_path / "own"), views=views, smoothing=0.05)
    monkeypatch.setenv("SIMADV_TRUST", str(exported[0] / "model.pt2"))
    explain(str(exported[0] / "model.pt2"), inputs, str(tmp_path / "pt2"))
    program = np.load(next((tmp_path / "pt2").glob("*.npy")))
    one, two = (np.load(next((tmp_path / name).glob("*.npy"))) for name in ("onnx", "own"))
    assert one.shape == (40, 50)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(program, two, atol=1e-5)
    with pytest.raises(ValueError, match="an exported model has its own size"):
        explain(str(exported[0] / "model.onnx"), inputs, str(tmp_path / "x"), smoothing=0.1)
    with pytest.raises(ValueError, match=r"card\.json is missing: keep it beside the model"):
        explain(str(tmp_path / "model.onnx"), inputs, str(tmp_path / "x"))


@pytest.mark.skipif(not REAL, reason="needs data/dicom")
def test_real_dicom_files_are_explained_by_the_exported_model(
    exported: tuple[Path, str], tmp_path: Path
) -> None:
    main(["explain", str(exported[0] / "model.onnx"), *map(str, REAL), "-o", str(tmp_path)])
    for path in REAL:
        source = dcmread(path, stop_before_pixels=True)
        [heat] = tmp_path.glob(f"{path.stem}_*.npy")
        values = np.load(heat)
        region = segread(heat.with_name(f"{heat.stem}_region.dcm"))
        assert (region.pixel_array == (values > np.percentile(values, 95))).all()
        assert region.get_source_image_uids()[0][2] == source.SOPInstanceUID
        overlay = dcmread(heat.with_name(f"{heat.stem}_overlay.dcm"))
        assert (overlay.pixel_array == np.asarray(Image.open(heat.with_suffix(".png")))).all()
        assert overlay.StudyInstanceUID == region.StudyInstanceUID == source.StudyInstanceUID


def test_an_explainer_that_looks_up_its_generator_is_refused(
    phantom_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = MaskGenerator(str(phantom_classifier))
    monkeypatch.setattr("explainers.__main__.load_explainer", lambda path: generator)
    with pytest.raises(ValueError, match="MaskGenerator cannot be exported: it needs"):
        export("x.ckpt", Phantom(loading=Loading(size=32)), str(tmp_path))
    with pytest.raises(SystemExit):
        main(["export"])
