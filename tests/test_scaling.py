"""What docs/scaling.md says can be run: images packed, explained and judged as an archive."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from files import write_image

import evaluate
from datamodules import Phantom
from datamodules.base import Loading
from explainers.__main__ import main

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "scaling.md").read_text()
SCORED = """
data:
  class_path: datamodules.{name}
  init_args:
    {source}
    classes: [healthy, opacity]
    loading: {{size: 32, batch_size: 4, in_memory: false}}
classifier: {classifier}
explainers: {{Single: {single}}}
smoothing: [0]
split: val
pictured: 1
accelerator: cpu
out: {out}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Phantom images as files of a table, and the archive that the document makes of them."""
    monkeypatch.setenv("SIMADV_DATA", str(tmp_path))
    data = Phantom(6, 6, 6, loading=Loading(32))
    lines = ["image,label,split,mask"]
    for split in ("train", "val", "test"):
        for record, sample in map(data.dataset(split).item, range(6)):
            stem = record.id.replace("/", "_")
            pixels = (sample.image[0] * 255).round().numpy().astype(np.uint8)
            write_image(tmp_path / f"{stem}.png", pixels)
            mask = ""
            if sample.mask is not None:
                mask = f"{stem}_mask.png"
                write_image(tmp_path / mask, 255 * sample.mask.numpy().astype(np.uint8))
            lines.append(f"{stem}.png,{['healthy', 'opacity'][record.label]},{split},{mask}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    snippet = DOC.split("<!-- packed archive -->\n```python\n")[1].split("```")[0]
    assert "maxcount=1000" in snippet
    (tmp_path / "pack.py").write_text(snippet.replace("maxcount=1000", "maxcount=7"))
    command = [sys.executable, "pack.py", "labels.csv", "archive"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_an_archive_is_explained_and_judged(
    root: Path, phantom_classifier: Path, phantom_single: Path
) -> None:
    shards = str(root / "archive" / "{000000..000002}.tar")
    main(["explain", str(phantom_single), shards, "-o", str(root / "out"), "--accelerator", "cpu"])
    every = pd.read_parquet([str(path) for path in sorted((root / "out").glob("*.parquet"))])
    assert every["key"].tolist() == [f"{k:09d}" for k in range(18)]
    assert every["decision"].isin(["healthy", "opacity"]).all()
    found = {}
    for name, source in (("Shards", "shards: archive/*.tar"), ("ImageTable", "table: labels.csv")):
        config = root / f"{name}.yaml"
        paths = {"classifier": phantom_classifier, "single": phantom_single, "out": root / name}
        config.write_text(SCORED.format(name=name, source=source, **paths))
        evaluate.main(["compare", "--config", str(config)])
        found[name] = pd.read_csv(root / name / "table.csv").query("method == 'Single'")
    assert len(found["Shards"])
    columns = ["metric", "mean", "n"]
    one, other = (found[name][columns].reset_index(drop=True) for name in found)
    pd.testing.assert_frame_equal(one, other)


def test_named_files_exist() -> None:
    named = re.findall(r"`((?:configs|tests|benchmarks)/[\w./-]+\w)`", DOC)
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]
