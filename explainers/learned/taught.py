"""Maps that a student learns: computed once, and kept for a training that goes on."""

from __future__ import annotations

import warnings
from hashlib import sha256
from pathlib import Path
from time import monotonic

import torch
from jaxtyping import Float
from torch import Tensor

from explainers.whole import whole

PATIENCE = 60  # seconds of new maps that a kill may cost


class Taught:
    """Maps by the name of their image, in memory and in files.

    Each process writes a file of its own, NAME-RANK.pt, and reads those of all: a name and the
    hash of an image's values to its map. What was read counts for an image of the same values only.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}
        self.known: dict[str, tuple[str, Tensor]] = {}
        self.path: Path | None = None
        self.unwritten, self.written_at = 0, 0.0

    def open(self, folder: Path, name: str, rank: int) -> None:
        """Read what was kept under a name, and keep what is new there."""
        self.path, self.written_at = folder / f"{name}-{rank}.pt", monotonic()
        for path in sorted(folder.glob(f"{name}-*.pt")):
            try:
                self.known |= torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file raises
                warnings.warn(f"{path} cannot be read ({error}); its maps are new.", stacklevel=2)

    def find(self, image: Float[Tensor, "b c h w"], names: list[str]) -> list[int]:
        """Places of the images without a map."""
        for name, values in zip(names, image, strict=True):
            if name not in self.maps and name in self.known:
                digest, one = self.known[name]
                if digest == hash_of(values):
                    self.maps[name] = one
        return [k for k, name in enumerate(names) if name not in self.maps]

    def add(
        self, image: Float[Tensor, "b c h w"], names: list[str], maps: Float[Tensor, "b 1 h2 w2"]
    ) -> None:
        """Keep new maps; write all of them where the last time is long ago."""
        for name, values, one in zip(names, image, maps.cpu(), strict=True):
            self.maps[name] = one.clone()
            if self.path:
                self.known[name] = hash_of(values), self.maps[name]
        self.unwritten += len(names)
        if monotonic() - self.written_at > PATIENCE:
            self.write()

    def write(self) -> None:
        """Write what is new; where there is no room, training goes on without."""
        if not self.path or not self.unwritten:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.path) as file:
                torch.save(self.known, file)
        except OSError as error:
            warnings.warn(f"{error} The maps that are learnt are not kept.", stacklevel=2)
            self.path = None
        self.unwritten, self.written_at = 0, monotonic()


def hash_of(image: Float[Tensor, "c h w"]) -> str:
    """16 hexadecimal digits of an image's values."""
    return sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
