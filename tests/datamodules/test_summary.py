"""The summary of a data set, by hand, and on RSNA's real tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from files import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from datamodules import Phantom
from datamodules.base import Loading, data_root
from datamodules.phantom import Phantom as PhantomModule
from datamodules.summary import (
    Content,
    box_frame,
    box_rows,
    connected_boxes,
    content_of_module,
    content_of_tables,
    counts,
    main,
    report,
    sizes,
    union,
)

CONFIG = """
model: {class_path: not.looked.at}
trainer: {max_epochs: 3}
data:
  class_path: datamodules.Phantom
  init_args: {train: 4, val: 2, test: 6, loading: {size: 32}}
"""


def test_box_rows_by_hand() -> None:  # 512 x 256 of 1024 pixels: a half by a quarter
    row = box_rows("test", [(0.0, 512.0, 256.0, 1024.0)], 1024, 224)[0]
    assert row == {"split": "test", "height": 112.0, "width": 56.0, "area": 12.5}


def test_union_by_hand() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    assert math.isnan(union(mask))
    assert math.isnan(union(None))
    mask[1:3, 1:3] = True
    assert union(mask) == 25.0


def test_connected_boxes_by_hand() -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True  # they touch at a corner
    mask[3:6, 4:7] = True
    assert connected_boxes(mask) == [(0, 0, 2, 2), (4, 3, 7, 6)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
def test_connected_box_of_a_rectangle_is_itself(x: int, y: int, width: int, height: int) -> None:
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[y : y + height, x : x + width] = True
    assert connected_boxes(mask) == [(x, y, x + width, y + height)]


def small() -> Content:
    """Four images: two train, one val, one test without any evidence."""
    images = pd.DataFrame(
        {
            "split": ["train", "train", "val", "test"],
            "label": ["a", "b", "b", "a"],
            "group": ["p", "p", "q", ("x",)],
            "union": [math.nan, 30.0, 10.0, math.nan],
        }
    )
    boxes = [(0.0, 0.0, 10.0, 20.0), (0.0, 0.0, 30.0, 40.0)]
    return Content(images, box_frame(box_rows("train", boxes, 100, 100)))


def test_counts_by_hand() -> None:
    table = counts(small().images)
    assert table.loc["train"].to_dict() == {
        "images": 2,
        "groups": 1,
        "with mask %": 50.0,
        "a": 1,
        "b": 1,
    }
    assert table.loc["test", ["images", "with mask %", "b"]].tolist() == [1, 0, 0]


def test_sizes_by_hand() -> None:
    table = sizes(small())
    assert table.loc[("train", "height")].tolist() == [2, 20, 40, 30, 30]
    assert table.loc[("train", "area")].tolist() == [2, 2, 12, 7, 7]
    assert table.loc[("val", "union")].tolist() == [1, 10, 10, 10, 10]


def test_a_data_set_without_evidence_has_a_report() -> None:
    content = Content(small().images.assign(union=math.nan), box_frame([]))
    assert sizes(content)["count"].fillna(0).eq(0).all()
    assert "with mask %" in report(content)


def test_content_of_a_module_agrees_with_its_batches() -> None:
    data = Phantom(6, 4, 20, loading=Loading(size=48, batch_size=20), evidence="boxes")
    content = content_of_module(data)
    (batch,) = data.loader("test")
    found = content.images.query("split == 'test'")
    expected = 100 * batch["mask"].float().mean((1, 2))
    assert_close(torch.tensor(found["union"].fillna(0).to_numpy()).float(), expected)
    assert found["label"].tolist() == [data.class_names[i] for i in batch["label"].tolist()]
    assert len(content.images) == 30


def test_folds_are_counted_where_they_are_used() -> None:
    data = PhantomModule(8, 4, 12, loading=Loading(size=32), fold=0, folds=4)
    assert counts(content_of_module(data).images)["images"].tolist() == [12, 6, 6]


def test_config_and_command_line_print_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    main(["-c", str(tmp_path / "config.yaml")])
    by_config = capsys.readouterr().out
    options = ["train=4", "val=2", "test=6", "loading.size=32"]
    main(["--data=Phantom", *[f"--data.{option}" for option in options]])
    assert capsys.readouterr().out == by_config
    assert by_config.splitlines()[2].split()[:4] == ["train", "4", "4", "50.0"]
    content = yaml.safe_load(CONFIG)["data"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "preset.yaml").write_text("data: data.yaml\n")  # relative to the preset
    main(["-c", str(tmp_path / "preset.yaml")])
    assert capsys.readouterr().out == by_config


def test_images_that_cannot_be_read_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
    lines = ["image,label,split"]
    for k, split in enumerate(["train", "val", "test"] * 2):
        write_image(tmp_path / f"{k}.png", np.full((8, 8), 9, np.uint8))
        lines.append(f"{k}.png,a,{split}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    options = ["--data=ImageTable", "--data.table=t.csv", "--data.loading.size=8"]
    main(options)
    assert "cannot be read" not in capsys.readouterr().out
    (tmp_path / "4.png").write_bytes(b"no image")
    main(options)
    told = capsys.readouterr().out.splitlines()
    assert told[-2] == "1 of 6 images cannot be read:"
    assert told[-1].startswith(f"Table {tmp_path / 't.csv'}, line 6: Image {tmp_path / '4.png'} ")
    assert [line.split()[1] for line in told[2:5]] == ["2", "1", "2"]


@pytest.mark.parametrize("text", ["", "model: {}"])
def test_a_missing_data_set_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["-c", str(tmp_path / "config.yaml")])
    assert "Name a data set" in capsys.readouterr().err


def test_real_tables_give_the_published_figures() -> None:
    """Exams, and Table III of arXiv:2012.07332 for the positive test exams at 224 px."""
    folder = data_root() / "rsna"
    if not folder.is_dir():
        pytest.skip(f"RSNA's tables are not in {folder}")
    content = content_of_tables(folder, 224)
    table = counts(content.images)
    assert table["images"].tolist() == [11917, 1495, 1451]
    assert table["opacity"].tolist() == [4852, 591, 569]
    found = sizes(content).loc["test"]
    assert found["count"].tolist() == [904, 904, 904, 569]
    columns = ["min", "max", "mean", "median"]
    np.testing.assert_allclose(found.loc["height", columns], [12.9, 170.6, 71.8, 67.8], atol=0.051)
    np.testing.assert_allclose(found.loc["width", columns], [12.9, 90.6, 47.5, 46.8], atol=0.051)
    np.testing.assert_allclose(found.loc["area", columns[:2]], [0.48, 25.3], atol=0.051)
    np.testing.assert_allclose(found.loc["area", columns[2:]], [7.3, 6.25], atol=0.051)
    np.testing.assert_allclose(
        found.loc["union", ["mean", "median", "max"]], [11.6, 8.6, 47.3], atol=0.15
    )
