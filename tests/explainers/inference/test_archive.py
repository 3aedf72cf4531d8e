"""An archive of tar shards explained into Parquet, stopped and damaged on the way."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from files import write_dicom
from PIL import Image
from torch import Tensor

from datamodules.images import read_image, resize_image
from explainers import load_explainer
from explainers.__main__ import explain, main
from explainers.inference import Answer
from explainers.inference.archive import explain_shards, found_shards
from explainers.inference.explain import Model, Row


def bright(image: Tensor) -> Answer:
    """The image itself is the map; bright ones are ill."""
    share = image.mean((1, 2, 3))
    probability = torch.stack([1 - share, share], 1)
    return Answer(probability, probability.argmax(1), image, image, image.mean(1))


MODEL = Model(bright, 16, 1, ["well", "ill"])
PICTURES = 5  # of a shard


def write_shard(path: Path, first: int, broken: bool = False) -> None:
    """Pictures of 32 x 64 pixels with a bright spot, the brighter the higher their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for k in range(first, first + PICTURES):
            pixels = np.full((32, 64), k, np.uint8)
            pixels[8:16, 32:48] = 255
            buffer = BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            content = b"no image" if broken and k == first + 1 else buffer.getvalue()
            for name, data in ((f"{k:04d}.png", content), (f"{k:04d}.json", b'{"label": "ill"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for shard in range(3):
        write_shard(tmp_path / "in" / f"{shard}.tar", 20 * shard, broken=shard == 1)
    return tmp_path


def run(folder: Path, model: Model = MODEL, out: str = "out", **options: int | bool) -> list[Row]:
    pattern = str(folder / "in" / "{0..2}.tar")
    return explain_shards(model, [pattern], folder / out, batch_size=2, **options)  # type: ignore[arg-type]


def rows(folder: Path) -> pd.DataFrame:
    parts = sorted(folder.glob("*.parquet"))
    return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)


KEYS = [f"{20 * shard + k:04d}" for shard in range(3) for k in range(PICTURES)]


def test_a_row_for_every_picture(archive: Path) -> None:
    failed = run(archive, keep_maps=True)
    assert [row["image"] for row in failed] == [str(archive / "in" / "1.tar" / "0021")]
    assert "1.tar/0021.png cannot be read" in failed[0]["error"]
    table = rows(archive / "out").set_index("key")
    assert table.index.tolist() == KEYS
    assert table.loc["0021", "error"] == failed[0]["error"]
    assert pd.isna(table.loc["0021", "decision"])
    row = table.loc["0040"]
    assert (row["height"], row["width"], row["decision"], row["error"]) == (32, 64, "well", "")
    assert row["p(ill)"] == pytest.approx((40 * 15 + 255) / 16 / 255, abs=1e-3)
    assert 32 <= row["peak_x"] < 48
    assert 8 <= row["peak_y"] < 16
    assert [box.tolist() for box in row["boxes"]] == [[32, 8, 48, 16]]
    heat = np.frombuffer(row["map"], np.float16).reshape(16, 16)
    assert heat[5, 10] == 1
    assert heat[0, 0] == pytest.approx(40 / 255, abs=1e-3)
    assert not [*(archive / "out").glob("*.growing")]


@pytest.mark.parametrize("options", [{"workers": 2}, {"devices": 2}, {"workers": 1, "devices": 3}])
def test_processes_and_devices_give_the_same_rows(archive: Path, options: dict[str, int]) -> None:
    run(archive)
    run(archive, out="more", **options)
    pd.testing.assert_frame_equal(rows(archive / "out"), rows(archive / "more"))


@pytest.mark.parametrize(("stop", "parts"), [(1, 0), (3, 1), (6, 2)])
def test_a_stopped_call_goes_on_at_the_first_unfinished_shard(
    archive: Path, stop: int, parts: int
) -> None:
    seen = Counter[float]()

    def stops(image: Tensor) -> Answer:
        seen.update(image[:, 0, 0, 0].tolist())
        if sum(seen.values()) > 2 * stop and not (archive / "again").exists():
            raise KeyboardInterrupt
        return bright(image)

    stopping = MODEL._replace(answer=stops)
    with pytest.raises(KeyboardInterrupt):
        run(archive, stopping)
    finished = [*(archive / "out").glob("*.parquet")]
    assert len(finished) == parts
    done = rows(archive / "out")["key"].tolist() if finished else []
    (archive / "again").touch()
    seen.clear()
    run(archive, stopping)
    assert sum(seen.values()) == len([key for key in KEYS if key not in done and key != "0021"])
    assert rows(archive / "out")["key"].tolist() == KEYS
    seen.clear()
    assert len(run(archive, stopping)) == 1  # what could not be read is told again
    assert not seen


def test_a_shard_that_cannot_be_read_leaves_no_part(archive: Path) -> None:
    path = archive / "in" / "1.tar"
    whole = path.read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512
    for left in (end, 1536, 700, 0):  # before the end mark, after a member, in one, at once
        path.write_bytes(whole[:left])
        failed = run(archive)
        assert [row["image"] for row in failed] == [str(path)], left
        assert failed[0]["error"].startswith(f"Shard {path} cannot be read: "), left
        assert rows(archive / "out")["key"].tolist() == KEYS[:5] + KEYS[10:], left
    path.write_bytes(whole)
    run(archive)
    assert rows(archive / "out")["key"].tolist() == KEYS


def test_shards_come_through_a_program_too(archive: Path) -> None:
    run(archive)
    piped = f"pipe:cat {archive / 'in'}/{{0..2}}.tar"
    assert len(explain_shards(MODEL, [piped], archive / "piped")) == 1
    one, other = (rows(archive / name).sort_values("key") for name in ("out", "piped"))
    assert other.drop(columns="error").equals(one.drop(columns="error"))
    [row] = explain_shards(MODEL, [f"pipe:head -c 3000 {archive}/in/0.tar; false"], archive / "no")
    assert "cannot be read" in row["error"]


def test_what_is_refused(archive: Path) -> None:
    run(archive)
    with pytest.raises(ValueError, match="out is of another model or other settings"):
        run(archive, MODEL._replace(settings="other"))
    with pytest.raises(ValueError, match="out is of another model or other settings"):
        run(archive, keep_maps=True)
    for name in ("batch_size", "devices"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, but got 0"):
            explain_shards(MODEL, [str(archive / "in/0.tar")], archive / "x", **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 100\], but got -1"):
        explain_shards(MODEL, [str(archive / "in/0.tar")], archive / "x", percentile=-1)
    with pytest.raises(ValueError, match=r"nope\.tar' names no shard: give tar files"):
        found_shards([str(archive / "nope.tar")])
    assert not (archive / "x").exists()
    assert found_shards([str(archive / "in" / "*.tar")]) == [
        str(archive / "in" / f"{shard}.tar") for shard in range(3)
    ]


def test_a_map_that_is_not_finite_is_an_error(archive: Path) -> None:
    def lost(image: Tensor) -> Answer:
        return bright(image)._replace(map=image.mean(1) * torch.nan)

    failed = run(archive, MODEL._replace(answer=lost))
    assert len(failed) == len(KEYS)
    assert failed[0]["error"].endswith("0.tar/0000 is not finite: the model fails on it.")


def test_dicom_and_samples_without_an_image(archive: Path) -> None:
    write_dicom(archive / "film.dcm", np.full((16, 16), 200, np.uint8))
    (archive / "text.txt").write_text("no image")
    with tarfile.open(archive / "in" / "film.tar", "w") as tar:
        for name in ("film.dcm", "text.txt"):
            tar.add(archive / name, name)
    failed = explain_shards(MODEL, [str(archive / "in" / "film.tar")], archive / "films")
    assert [row["error"] for row in failed] == ["Sample 'text' holds no image: it has txt."]
    table = rows(archive / "films")
    assert table["decision"].tolist()[0] == "ill"
    assert table["p(ill)"][0] == pytest.approx(200 / 255, abs=1e-3)


def test_a_checkpoint_by_the_command(
    phantom_single: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = archive / "out"
    arguments = ["explain", str(phantom_single), str(archive / "in" / "*.tar"), "-o", str(out)]
    with pytest.raises(SystemExit, match=r"1 picture\(s\) could not be read"):
        main([*arguments, "--accelerator", "cpu", "--keep_maps", "true", "--smoothing", "0.05"])
    assert "0021.png cannot be read" in capsys.readouterr().out.replace("\n", "")
    row = rows(out).set_index("key").loc["0040"]
    with tarfile.open(archive / "in" / "2.tar") as tar:
        content = tar.extractfile("0040.png").read()  # type: ignore[union-attr]
    image = resize_image(read_image("0040.png", 1, content=content), 32)[None]
    explainer = load_explainer(phantom_single)
    expected = explainer.explain(image, smoothing=0.05)[0]
    found = np.frombuffer(row["map"], np.float16).reshape(32, 32).astype(np.float32)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    decision = int(explainer.network.decide(image))
    assert row["decision"] == explainer.network.class_names[decision]
    settings = json.loads((out / "settings.json").read_text())
    assert "map" in settings[0]
    path = str(archive / "in" / "0.tar")
    with pytest.raises(ValueError, match="memory_megabytes must be above the"):
        explain(str(phantom_single), [path], str(out), accelerator="cpu", memory_megabytes=1)
    with pytest.raises(ValueError, match="tar shards and files cannot be explained at once"):
        explain(str(phantom_single), [path, str(archive)], str(out))
    with pytest.raises(ValueError, match="workers and keep_maps are for tar shards: leave them"):
        explain(str(phantom_single), [str(archive)], str(out), workers=1)
