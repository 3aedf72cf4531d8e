"""Finished rows of a comparison kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
import pickle
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ByValue(pickle.Pickler):
    """Writes tensors by their values and sets in order, the same in every process."""

    def persistent_id(self, value: object) -> object:
        """What stands for a tensor (not its place in memory) or a set; None for the rest."""
        if isinstance(value, Tensor):
            content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            return str(value.dtype), tuple(value.shape), content
        return sorted(map(repr, value)) if isinstance(value, set | frozenset) else None


class Finished:
    """Results by the content of all that they follow from, one JSON file each.

    The files are named by a hash of the given facts, of what a result is asked for and of this
    package's source, so that a change of any of them computes anew.

    Args:
        folder: Where the files lie; made when the first is written.
        facts: Anything that can be pickled and that all results follow from.
    """

    def __init__(self, folder: Path, *facts: object) -> None:
        source = Path(__file__).parents[1]
        code = [path.read_bytes() for path in sorted(source.rglob("*.py"))]
        self.folder, self.facts = folder, (facts, code)

    def path(self, *wanted: object) -> Path | None:
        """File of a result; None where its content cannot be pickled, which is never kept."""
        content = BytesIO()
        try:
            ByValue(content).dump((self.facts, wanted))
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
        return self.folder / f"{sha256(content.getvalue()).hexdigest()[:20]}.json"

    def write(self, path: Path, result: object) -> None:
        """Keep a result of plain values; a kill meanwhile leaves no half file under its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        half.write_text(json.dumps(result))
        os.replace(half, path)

    def read(self, path: Path | None) -> Any:
        """The result, or None where it is not there."""
        return json.loads(path.read_text()) if path and path.exists() else None
