"""Rows and slow maps of a comparison kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from explainers.base import Explainer
from explainers.content import content_hash, source_of
from explainers.evaluation.compare import Cost, measured
from explainers.views import Views
from explainers.whole import write_whole

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
        files = [self.file(one) for one in image]
        new = [k for k, file in enumerate(files) if not (file and file.exists())]
        maps: dict[int, Tensor] = {}
        if new:
            before = cost.seconds
            with measured(cost, image[new]):
                drawn = self.explainer.explain(image[new], views=self.views)
            seconds = (cost.seconds - before) / len(new)
            maps = dict(zip(new, drawn, strict=True))
            for k, one in maps.items():
                if (file := files[k]) and seconds > SLOW:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    content, values = BytesIO(), one.cpu().numpy()
                    np.savez(content, map=values, seconds=seconds, megabytes=cost.megabytes)
                    write_whole(file, content.getvalue())
        for k, file in enumerate(files):
            if file and k not in maps:
                with np.load(file) as kept:
                    maps[k] = torch.from_numpy(kept["map"]).to(image.device)
                    cost.add(float(kept["seconds"]), float(kept["megabytes"]))
        return torch.stack([maps[k] for k in range(len(image))])

    def file(self, image: Float[Tensor, "c h w"]) -> Path | None:
        """File of an image's map."""
        if not self.folder:
            return None
        content = image.contiguous().cpu().numpy().tobytes()
        return self.folder / f"{sha256(content).hexdigest()[:20]}.npz"
