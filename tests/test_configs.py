"""Every preset in configs/ runs one batch; its five comment lines are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from files import write_image, write_isic
from jsonargparse import ArgumentParser

from classifiers import Network
from datamodules.base import ImageDataModule, data_root
from explainers import Geometry, Single
from train import main

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(p for p in CONFIGS.rglob("*.yaml") if "\nmodel:\n" in p.read_text())
CLASSES = {
    "busi": ["normal", "lesion"],
    "deeppcb": ["normal", "defect"],
    "phantom": ["healthy", "opacity"],
    "demo": ["healthy", "opacity"],
    "rsna": ["healthy", "opacity"],
    "isic": ["nevus", "melanoma"],
    "hfus": ["healthy", "lesion"],
    "clinical": ["healthy", "lesion"],
}
SMALL = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
SMALL += ["--data.loading.size", "64", "--data.loading.batch_size", "2"]
SMALL += ["--data.loading.workers", "0"]


def name_of(preset: Path) -> str:
    return str(preset.relative_to(CONFIGS))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained classifier for each data set, in a checkpoint as train.py writes it."""
    folder, paths = tmp_path_factory.mktemp("classifiers"), {}
    for data, names in CLASSES.items():
        network = Network("resnet18", class_names=names)
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        paths[data] = folder / f"{data}.ckpt"
        torch.save({"network": network.recipe, "state_dict": state}, paths[data])
    return paths


def write_study(name: str, folder: Path) -> None:
    """A small data set in the layout that the preset reads: two classes, images with evidence."""
    if name == "isic":
        write_isic(folder)
        return
    lines = ["image,label,split,case,importance,mask,age,sex,skin_type"]
    for k in range(12):
        split = ("train", "train", "val", "test")[k % 4]
        files = [f"image{k}.png", f"layers{k}.png", f"mask{k}.png"]
        for file, value in zip(files, (51, 4, 255), strict=True):
            write_image(folder / file, np.full((16, 16), value, np.uint8))
        cells = f"{files[1]}," if name == "hfus" else f",{files[2]}"
        label = ("healthy", "lesion")[k // 4 % 2]
        lines.append(f"{files[0]},{label},{split},case{k},{cells},4{k},F,II")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def write_teacher(classifier: Path, folder: Path) -> Path:
    """An untrained Single, in a checkpoint as train.py writes it."""
    single = Single(str(classifier), geometry=Geometry(widths=(4, 6)))
    content = {"state_dict": single.state_dict()}
    single.on_save_checkpoint(content)
    torch.save(content, folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_one_batch(
    preset: Path,
    classifiers: dict[str, Path],
    rsna_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = preset.relative_to(CONFIGS).parts[0]
    arguments = ["fit", "-c", str(preset), "--out", str(tmp_path), *SMALL]
    if data == "rsna":
        monkeypatch.setenv("SIMADV_DATA", str(rsna_folder.parent))
        arguments += ["--data.split", "seeded"]
    elif data in ("isic", "hfus", "clinical"):
        monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
        write_study(data, tmp_path / {"isic": "isic2018"}.get(data, data))
    elif data in ("busi", "deeppcb") and not (data_root() / data).exists():
        pytest.skip(f"no folder {data} under SIMADV_DATA")
    if preset.stem == "distilled":
        arguments += ["--model.teacher", str(write_teacher(classifiers[data], tmp_path))]
    elif not preset.stem.startswith("classifier"):
        arguments += ["--model.network", str(classifiers[data])]
    elif "weights: imagenet" in preset.read_text() and data not in ("busi", "deeppcb"):
        backbone = yaml.safe_load(preset.read_text())["model"]["init_args"]["network"]["init_args"]
        weights = tmp_path / "weights.pt"  # those of ImageNet would be downloaded
        torch.save(Network(backbone["backbone"], 1).backbone.state_dict(), weights)
        arguments += ["--model.network.init_args.weights", str(weights)]
    if preset.stem == "classifier_inception_v3":
        arguments += ["--data.loading.size", "75"]
    trainer = main(arguments).trainer
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 1
    assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_five_comment_lines(preset: Path) -> None:
    lines = preset.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:5])
    assert not lines[5].startswith("#")
    assert lines[1] == f"# python train.py fit -c configs/{name_of(preset)}"
    assert lines[4].startswith("# Known differences: ")


@pytest.mark.parametrize(("folder", "module"), [("busi", "BUSI"), ("deeppcb", "DeepPCB")])
def test_the_public_download_stands_in_for_the_table(
    folder: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--data` after a preset: the other module, images loaded alike."""
    files = [str(CONFIGS / folder / name) for name in ("classifier.yaml", "data_download.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", "-c", files[0], "--data", files[1], "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == f"datamodules.{module}"
    expected = yaml.safe_load((CONFIGS / folder / "data.yaml").read_text())["init_args"]
    for part in ("loading", "augmentation"):
        assert expected[part].items() <= data["init_args"][part].items()


def test_the_best_epoch_by_a_witness_needs_no_mask(
    classifiers: dict[str, Path], tmp_path: Path
) -> None:
    presets = ["-c", str(CONFIGS / "demo" / "single1.yaml"), "-c", str(CONFIGS / "witness.yaml")]
    few = ["--data.train=8", "--data.val=4", "--data.loading={batch_size: 4, size: 32}"]
    out = [f"--model.network={classifiers['demo']}", f"--out={tmp_path}", "--logging=csv"]
    rate = ["--trainer.max_epochs=4", "--model.optimisation.learning_rate=0.003"]
    main(["fit", *presets, *few, *out, *rate, "--trainer.accelerator=cpu"])
    table = pd.read_csv(tmp_path / "metrics.csv").set_index("epoch")
    scores = table["val/witness/Gradient"].dropna()
    assert len(scores) == 4
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["epoch"] == scores.idxmax()
    (kept,) = (state for key, state in best["callbacks"].items() if key.startswith("Checkpoints"))
    assert float(kept["best_model_score"]) == pytest.approx(scores.max(), abs=1e-6)


def test_every_row_of_table_1_in_both_readings() -> None:
    """Table I by hand: the columns read as l_s l_a l_sa c_s c_a w t, and c_s, l_sa exchanged."""
    table = {
        "duo_tv": (1, 1, 1, 0, 0.001, 0, 0.2),
        "duo_w_tv": (1, 1, 1, 0, 0.001, 0.1, 0.2),
        "single1_tv": (1, 1, 1, 0, 0.001, 0, 0.2),
        "single1_w": (3, 1, 1, 0.2, 0.001, 0.1, 0),
        "single1_w_tv": (1, 1, 1, 0.2, 0.001, 0.1, 0.2),
        "single2_w": (3, 1, 1, 0.2, 0.001, 0.2, 0),
        "single2_w_tv": (3, 1, 1, 0.2, 0.001, 0.2, 0.2),
    }
    first = ["similar", "adversarial", "pair", "classify_similar"]
    second = ["similar", "adversarial", "classify_similar", "pair"]
    rest = ["classify_adversarial", "proximity", "variation"]
    for folder, order in (("rsna", first), ("rsna/reading2", second)):
        for row, values in table.items():
            preset = yaml.safe_load((CONFIGS / folder / f"{row}.yaml").read_text())
            weights = preset["model"]["init_args"]["weights"]
            assert [weights[key] for key in order + rest] == list(values)
            optimisation = preset["model"]["init_args"]["optimisation"]
            assert optimisation["abnormal_per_normal"] == 1  # "epochs balanced"
            if "single" in row:
                assert preset["model"]["init_args"]["convolutions"] == int(row[6])


@pytest.fixture(scope="session")
def rsna_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The challenge's layout with 30 small exams of random values."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    folder = tmp_path_factory.mktemp("data") / "rsna"
    images = folder / "stage_2_train_images"
    images.mkdir(parents=True)
    rng, boxes, classes = np.random.default_rng(0), [], []
    for k in range(30):
        name, positive = f"exam-{k:02d}", k % 2
        dicom = Dataset()
        dicom.file_meta = FileMetaDataset()
        dicom.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dicom.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        dicom.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dicom.Rows = dicom.Columns = 1024
        dicom.BitsAllocated = dicom.BitsStored = 8
        dicom.HighBit, dicom.PixelRepresentation, dicom.SamplesPerPixel = 7, 0, 1
        dicom.PhotometricInterpretation = "MONOCHROME2"
        pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8).repeat(64, 0).repeat(64, 1)
        dicom.PixelData = pixels.tobytes()
        dicom.save_as(images / f"{name}.dcm", enforce_file_format=True)
        box = (100, 200, 300, 250) if positive else (None,) * 4
        boxes.append((name, *box, positive))
        classes.append((name, "Lung Opacity" if positive else "Normal"))
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    pd.DataFrame(boxes, columns=columns).to_csv(folder / "stage_2_train_labels.csv", index=False)
    info = pd.DataFrame(classes, columns=["patientId", "class"])
    info.to_csv(folder / "stage_2_detailed_class_info.csv", index=False)
    return folder


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*/data*.yaml")), ids=name_of)
def test_data_presets_are_understood(preset: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    given = yaml.safe_load(preset.read_text())
    parsed = parser.parse_args(["--data", str(preset)]).data
    assert parsed.class_path.rsplit(".", 1)[-1] == given["class_path"].rsplit(".", 1)[-1]
    assert parsed.init_args.loading.size == given["init_args"]["loading"]["size"]
