"""Draws a data set that no setting was chosen on, as files like a user's own: faulty surfaces.

python -m benchmarks.surfaces
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from datamodules.base import SPLITS, data_root

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
SIZE = 160  # pixels
X, Y = np.meshgrid(np.arange(SIZE, dtype=np.float64), np.arange(SIZE, dtype=np.float64))


def field(rng: RandomState, sigma: float | tuple[float, float]) -> Array:
    """Smooth noise of mean 0 and standard deviation 1; sigma in pixels, (y, x) or of both."""
    noise: Array = ndimage.gaussian_filter(rng.standard_normal(X.shape), sigma)
    scaled: Array = (noise - noise.mean()) / noise.std()
    return scaled


def woven(rng: RandomState) -> Array:
    """Threads, 6 to 11 pixels apart, with noise."""
    frequency, angle = 2 * np.pi / rng.uniform(6, 11), rng.uniform(0, 0.3)
    u, v = X * np.cos(angle) + Y * np.sin(angle), Y * np.cos(angle) - X * np.sin(angle)
    threads: Array = np.sin(frequency * u) * np.sin(frequency * v) + 0.5 * field(rng, 0)
    return threads


def surface(rng: RandomState) -> Array:
    """A brushed, cast or woven surface under uneven light; grey values in 0 .. 1."""
    kind = rng.randint(3)
    if kind == 0:
        texture = field(rng, (0.6, rng.uniform(10, 30)))
    elif kind == 1:
        texture = field(rng, rng.uniform(1, 2)) + 0.5 * field(rng, 6)
    else:
        texture = woven(rng)
    texture *= rng.uniform(0.04, 0.1) / texture.std()
    return rng.uniform(0.4, 0.6) + texture + 0.06 * field(rng, 50)


def blob(rng: RandomState, radius: float) -> Mask:
    """A turned ellipse with an uneven outline, wholly or nearly inside."""
    (y, x), angle = rng.uniform(radius, SIZE - radius, 2), rng.uniform(0, np.pi)
    u = (X - x) * np.cos(angle) + (Y - y) * np.sin(angle)
    v = (Y - y) * np.cos(angle) - (X - x) * np.sin(angle)
    far = np.hypot(u, v / rng.uniform(0.6, 1)) / radius
    inside: Mask = far < 1 + 0.25 * field(rng, max(radius / 3, 1.5))
    return inside


def scratch(rng: RandomState) -> Mask:
    """A bent line, 25 to 90 pixels long, 3 or 5 wide."""
    (y, x), angle = rng.uniform(25, SIZE - 25, 2), rng.uniform(0, 2 * np.pi)
    angles = angle + rng.normal(0, 0.02) * np.arange(rng.randint(25, 90))
    path = np.stack((y + np.sin(angles).cumsum(), x + np.cos(angles).cumsum())).astype(int)
    rows, columns = path[:, ((path >= 0) & (path < SIZE)).all(0)]
    line = np.zeros(X.shape, dtype=bool)
    line[rows, columns] = True
    thick: Mask = ndimage.binary_dilation(line, iterations=rng.randint(1, 3))
    return thick


def fault(rng: RandomState) -> Mask:
    """A scratch, one to four pits or a stain."""
    kind = rng.randint(3)
    if kind == 0:
        return scratch(rng)
    radii = rng.uniform(3, 6, rng.randint(1, 5)) if kind == 1 else rng.uniform(10, 25, 1)
    found: Mask = np.any([blob(rng, radius) for radius in radii], axis=0)
    return found


def draw(rng: RandomState, faulty: bool) -> tuple[Array, Mask]:
    """A surface, grey values in 0 .. 1, and its faults, each (SIZE, SIZE)."""
    image, mask = surface(rng), np.zeros(X.shape, dtype=bool)
    if faulty:
        mask = fault(rng)
        depth = rng.choice([-1, 1]) * rng.uniform(0.1, 0.3)  # darker or brighter
        image += depth * ndimage.gaussian_filter(mask.astype(np.float64), 0.8)
    return (image + 0.02 * rng.standard_normal(X.shape)).clip(0, 1), mask


def write(folder: Path, counts: dict[str, int], share: float, seed: int) -> None:
    """Images, masks of the faults, and ``labels.csv``, which is written last.

    Args:
        folder: Is made.
        counts: Images of each split.
        share: Of faulty images, 0 .. 1; half of the test images are.
        seed: Of all images.

    Raises:
        ValueError: If the share is outside 0 .. 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"faulty must be a share in 0 .. 1, but got {share}.")
    rng, rows = RandomState(seed), []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        for number in range(count):
            faulty = number < round(count * (0.5 if split == "test" else share))
            pixels, mask = draw(rng, faulty)
            name = f"{split}{number:04d}.png"
            Image.fromarray(np.uint8(255 * pixels)).save(folder / "images" / name)
            if faulty:
                Image.fromarray(np.uint8(255 * mask)).save(folder / "masks" / name)
            label, where = ("defect", f"masks/{name}") if faulty else ("good", "")
            rows.append({"image": f"images/{name}", "label": label, "mask": where, "split": split})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


def main(
    train: int = 600, val: int = 120, test: int = 240, faulty: float = 0.5, seed: int = 0
) -> None:
    """Write the images into ``surfaces`` of the data root, ``SIMADV_DATA``.

    Args:
        train: Images.
        val: Images.
        test: Images, half of them faulty.
        faulty: Share of faulty images in the other splits.
        seed: Of all images.
    """
    folder = data_root() / "surfaces"
    write(folder, dict(zip(SPLITS, (train, val, test), strict=True)), faulty, seed)
    print(f"{train + val + test} surfaces in {folder}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
