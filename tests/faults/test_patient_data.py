"""What DICOM headers say of a patient does not leave them but for the objects of his own study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from files import write_dicom
from pydicom import dcmread

import evaluate
from datamodules import ImageTable
from datamodules.base import Loading
from explainers import __main__ as command
from explainers.attribution import Gradient

pytestmark = pytest.mark.faults
PLANTED = {
    "PatientName": "PLANTEDNAME^ROSA",
    "PatientID": "PLANTEDID4711",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "PLANTEDACC",
    "InstitutionName": "PLANTEDHOSPITAL",
    "ReferringPhysicianName": "PLANTEDDOCTOR",
    "StudyInstanceUID": "1.2.840.99999.4711",
    "SeriesDescription": "PLANTEDSERIES",
}
PRIVATE = "PLANTEDPRIVATE"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageTable:
    """Twelve DICOM files with planted headers; one of them is damaged."""
    monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
    rng, folder = np.random.default_rng(0), tmp_path / "study"
    lines = ["image,label,boxes,split"]
    for k in range(12):
        path = folder / f"{k}.dcm"
        write_dicom(path, rng.integers(0, 256, (16, 16), np.uint8))
        dataset = dcmread(path)
        for name, value in PLANTED.items():
            setattr(dataset, name, value)
        dataset.private_block(0x11, "PLANTEDCREATOR", create=True).add_new(1, "LO", PRIVATE)
        dataset.save_as(path, enforce_file_format=True)
        boxes = '"[[2, 2, 9, 9]]"' if k % 2 else ""
        split = ("train", "val", "test")[k // 4]
        lines.append(f"{k}.dcm,{'ill' if k % 2 else 'well'},{boxes},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    damaged = dcmread(folder / "0.dcm")
    damaged.PixelData = b"\0\0"
    damaged.save_as(tmp_path / "damaged.dcm", enforce_file_format=True)
    classes = {"well": ["well"], "ill": ["ill"]}
    return ImageTable("study/labels.csv", classes, loading=Loading(16, batch_size=4))


def leaks(folder: Path, told: str) -> set[tuple[str, str]]:
    """Planted values in any file of a folder, or in what was printed, in 8 or 16 bit."""
    content = {"printed": told.encode()}
    content |= {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    values = [part for value in PLANTED.values() for part in value.split("^")] + [PRIVATE]
    return {
        (name, value)
        for name, found in content.items()
        for value in values
        if value.encode() in found or value.encode("utf-16-le") in found
    }


def test_no_header_reaches_an_output(
    data: ImageTable,
    train: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    tell_fault: Callable[[str, int, int], None],
) -> None:
    assert leaks(tmp_path / "study", "")  # they are there to be found
    out, preset = tmp_path / "out", tmp_path / "preset.yaml"
    preset.write_text(
        "data:\n  class_path: datamodules.ImageTable\n  init_args:\n    table: study/labels.csv\n"
        "    classes: {well: [well], ill: [ill]}\n    loading: {size: 16, batch_size: 4}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}\n"
    )
    network = ("--model.network", "Network", "--model.network.backbone", "resnet10t")
    train("fit", "-c", preset, "--model", "Classifier", *network, "--out", out / "classifier")
    checkpoint = out / "classifier" / "last.ckpt"
    single = (
        "--model",
        "Single",
        "--model.network",
        checkpoint,
        "--model.geometry.widths",
        "[4, 6]",
    )
    train("fit", "-c", preset, *single, "--out", out / "single")
    learned, methods = {"Single": str(out / "single" / "last.ckpt")}, {"Gradient": Gradient}
    evaluate.compare(
        data,
        str(checkpoint),
        learned,
        methods,
        smoothing=(0.0,),
        out=str(out / "compare"),
        accelerator="cpu",
        logging="wandb",
    )
    failed = command.explain(
        learned["Single"],
        [str(tmp_path / "study"), str(tmp_path / "damaged.dcm")],
        str(out / "explained"),
        accelerator="cpu",
    )
    assert [Path(row["image"]).name for row in failed] == ["damaged.dcm"]
    objects = list((out / "explained").glob("*.dcm"))
    assert len(objects) == 24
    assert all(dcmread(path).PatientID == PLANTED["PatientID"] for path in objects)
    for path in objects:  # of the patient's own study: they belong beside the pictures
        path.unlink()
    printed = "".join(capfd.readouterr())
    assert list((out / "compare").rglob("*.wandb"))
    assert (out / "compare" / "report.html").exists()
    found = leaks(out, printed)
    tell_fault("patient data in outputs", len(PLANTED) + 1, len(PLANTED) + 1 - len(found))
    assert found == set()
