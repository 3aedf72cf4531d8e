"""Finished rows of a comparison kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import pickle
import re
import sys
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explainers.whole import write_whole

PACKAGE = __name__.split(".")[0]
SCORING = f"{PACKAGE}.evaluation.compare"
IMPORTS = re.compile(rf"^(?:from|import) ({PACKAGE}[\w.]*)", re.MULTILINE)


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
        content = BytesIO()
        try:
            ByValue(content).dump(
                (self.facts, explainer, wanted, source_of(type(explainer), SCORING))
            )
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
        return self.folder / f"{sha256(content.getvalue()).hexdigest()[:20]}.json"

    def write(self, path: Path, result: object) -> None:
        """Keep a result of plain values; a kill meanwhile leaves no half file under its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result))

    def read(self, path: Path | None) -> Any:
        """The result, or None where it is not there."""
        return json.loads(path.read_text()) if path and path.exists() else None


def source_of(cls: type, *modules: str) -> list[str]:
    """Source of the modules that define a class and its parents, and of modules by name.

    With all that they import from this package. What other packages hold does not count, but for
    the class itself: theirs is the versions' business.
    """
    waiting = {parent.__module__ for parent in cls.__mro__[:-1]} | set(modules)
    sources: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = getattr(sys.modules.get(name), "__file__", None)
        if name in sources or not path:
            continue
        sources[name] = Path(path).read_text() if path.endswith(".py") else ""
        if name.split(".")[0] == PACKAGE:
            waiting |= set(IMPORTS.findall(sources[name]))
    return [sources[name] for name in sorted(sources)]
