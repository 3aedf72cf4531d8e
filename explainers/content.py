"""Hashes of what a result follows from, the same in every process."""

from __future__ import annotations

import pickle
import re
import sys
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = __name__.split(".")[0]
IMPORTS = re.compile(rf"^(?:from|import) ({PACKAGE}[\w.]*)", re.MULTILINE)


class ByValue(pickle.Pickler):
    """Writes tensors by their values and sets in order, the same in every process."""

    def persistent_id(self, value: object) -> object:
        """What stands for a tensor (not its place in memory) or a set; None for the rest."""
        if isinstance(value, Tensor):
            content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            return str(value.dtype), tuple(value.shape), content
        return sorted(map(repr, value)) if isinstance(value, set | frozenset) else None


def content_hash(*facts: object) -> str | None:
    """20 hexadecimal digits of everything in these; None where something cannot be pickled."""
    content = BytesIO()
    try:
        ByValue(content).dump(facts)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
    return sha256(content.getvalue()).hexdigest()[:20]


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
