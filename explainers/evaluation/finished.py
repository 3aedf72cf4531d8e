"""Finished rows of a comparison kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from explainers.content import content_hash, source_of
from explainers.whole import write_whole

SCORING = "explainers.evaluation.compare"


class Finished:
    """Results by the content of all that they follow from, one JSON file each.

    The files are named by a hash of the given facts, of what a result is asked for and of the
    source that it follows from, so that a change of any of them computes anew.

    Args:
        folder: Where the files lie; made when the first is written.
        facts: Anything that can be pickled and that all results follow from.
    """

    def __init__(self, folder: Path, *facts: object) -> None:
        self.folder, self.facts = folder, facts

    def path(self, explainer: object, *wanted: object) -> Path | None:
        """File of an explainer's result; None where its content cannot be pickled: never kept."""
        name = content_hash(self.facts, explainer, wanted, source_of(type(explainer), SCORING))
        return self.folder / f"{name}.json" if name else None

    def write(self, path: Path, result: object) -> None:
        """Keep a result of plain values; a kill meanwhile leaves no half file under its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result))

    def read(self, path: Path | None) -> Any:
        """The result, or None where it is not there."""
        return json.loads(path.read_text()) if path and path.exists() else None
