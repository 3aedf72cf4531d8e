"""Rows and slow maps of a comparison kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from explainers.base import Explainer
from explainers.content import content_hash, source_of
from explainers.evaluation.compare import Cost, measured
from explainers.views import Views
from explainers.whole import whole, write_whole

SCORING = "explainers.evaluation.compare"
SLOW = 1.0  # seconds: maps that took longer are kept


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


class Maps:
    """An explainer's maps; those that took more than a second each are kept on disk.

    A row that was stopped goes on with them, and so do other limits, metrics and pictures. The
    files are named by the content of the explainer, its source, the views and the image.

    Args:
        folder: Where the files lie; made when the first is written.
        explainer: Whose maps.
        views: Of the maps; the plain ones by default.
    """

    def __init__(self, folder: Path, explainer: Explainer, views: Views | None = None) -> None:
        self.explainer, self.views = explainer, views
        name = content_hash(explainer, views, source_of(type(explainer)))
        self.folder = folder / name if name else None  # what cannot be pickled is never kept

    def __call__(self, image: Float[Tensor, "b c h w"], cost: Cost) -> Float[Tensor, "b h w"]:
        """Maps of images; what each took when it was computed is added to the cost."""
        there = self.folder is not None and self.folder.exists()
        maps: dict[int, Tensor] = {}
        for k, one in enumerate(image if there else []):
            if kept := read(self.file(one)):
                maps[k] = kept["map"].to(image.device)
                cost.add(kept["seconds"], kept["megabytes"])
        if new := [k for k in range(len(image)) if k not in maps]:
            before = cost.seconds
            with measured(cost, image[new]):
                drawn = self.explainer.explain(image[new], views=self.views)
            seconds = (cost.seconds - before) / len(new)
            maps |= dict(zip(new, drawn, strict=True))
            if self.folder and seconds > SLOW:
                self.folder.mkdir(parents=True, exist_ok=True)
                took = {"seconds": seconds, "megabytes": cost.megabytes}
                for k in new:
                    with whole(self.file(image[k])) as file:
                        torch.save({"map": maps[k].clone(), **took}, file)
        return torch.stack([maps[k] for k in range(len(image))])

    def file(self, image: Float[Tensor, "c h w"]) -> Path:
        """File of an image's map."""
        assert self.folder
        return self.folder / f"{content_hash(image)}.pt"


def read(file: Path) -> dict[str, Any] | None:
    """What a file of a map holds, or None where there is none, or a damaged one."""
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file raises
        warnings.warn(f"{file} cannot be read ({error}); its map is computed anew.", stacklevel=2)
        return None
    return found
