"""Chest-like images drawn from a seed, with opacities whose place is known: no download needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray

from datamodules.base import (
    SPLITS,
    Augmentation,
    ImageDataModule,
    Loading,
    Record,
    Sample,
    Split,
)

Array = NDArray[np.float64]
Box = tuple[int, int, int, int]

# Quantiles 0, 5, .. 100 % of the box sides of the RSNA Pneumonia Detection Challenge, as a share of
# the image side, over the positive training exams of the split of arXiv:2012.07332.
# fmt: off
BOX_WIDTH = (
    0.0391, 0.1211, 0.1387, 0.1514, 0.1631, 0.1729, 0.1816, 0.1895, 0.1963, 0.2051, 0.2119,
    0.2188, 0.2256, 0.2344, 0.2422, 0.2520, 0.2627, 0.2734, 0.2881, 0.3096, 0.5156,
)
BOX_HEIGHT = (
    0.0439, 0.1172, 0.1426, 0.1621, 0.1807, 0.1973, 0.2148, 0.2334, 0.2510, 0.2715, 0.2900,
    0.3143, 0.3398, 0.3676, 0.3965, 0.4277, 0.4639, 0.5029, 0.5479, 0.6084, 0.9199,
)
# fmt: on
SIDE_CORRELATION = 0.6  # of the ranks of width and height, same boxes
SHARE_WITH_TWO = 0.55  # of the positive exams, same table
LUNG_X, LUNG_Y, LUNG_WIDTH, LUNG_HEIGHT = 0.205, 0.01, 0.31, 0.74  # centres and sides


@dataclass(frozen=True)
class Pose:
    """Where the body stands: shift as a share of the image side, angle in radians, scale."""

    x: float
    y: float
    angle: float
    scale: float

    @classmethod
    def draw(cls, rng: RandomState) -> Pose:
        """A pose near the middle."""
        x, y, angle, scale = rng.uniform((-0.05, -0.05, -0.08, 0.88), (0.05, 0.05, 0.08, 1.06))
        return cls(x, y, angle, scale)

    def to_body(self, size: int) -> tuple[Array, Array]:
        """Body coordinates of the pixel centres, each (size, size); the body's middle is 0, 0."""
        axis = (np.arange(size) + 0.5) / size - 0.5
        x, y = (axis - self.x)[None, :] / self.scale, (axis - self.y)[:, None] / self.scale
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return cos * x + sin * y, cos * y - sin * x

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        """Image coordinates in 0 .. 1 of a point of the body."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return (
            float(self.scale * (cos * x - sin * y) + self.x + 0.5),
            float(self.scale * (sin * x + cos * y) + self.y + 0.5),
        )


@dataclass(frozen=True)
class Opacity:
    """A blob that fills its half-open pixel box: a superellipse, ``|u|^p + |v|^p < 1``."""

    box: Box
    exponent: float
    contrast: float

    @classmethod
    def draw(cls, rng: RandomState, pose: Pose, side: int, size: int) -> Opacity:
        """An opacity in the right (-1) or left (1) lung; its sides follow the real boxes."""
        first, second = rng.standard_normal(2)
        second = SIDE_CORRELATION * first + np.sqrt(1 - SIDE_CORRELATION**2) * second
        width = min(quantile(first, BOX_WIDTH), LUNG_WIDTH * pose.scale)
        height = min(quantile(second, BOX_HEIGHT), LUNG_HEIGHT * pose.scale)
        x, y = rng.uniform(-0.5, 0.5, 2)
        x, y = pose.to_image(
            side * LUNG_X + x * (LUNG_WIDTH - 0.7 * width / pose.scale),
            LUNG_Y + y * (LUNG_HEIGHT - 0.8 * height / pose.scale),
        )
        (x0, x1), (y0, y1) = to_pixels(x, width, size), to_pixels(y, height, size)
        return cls((x0, y0, x1, y1), rng.uniform(1.6, 2.6), rng.uniform(0.19, 0.31))

    def depth(self) -> Array:
        """How far inside each pixel of the box lies: 1 in the middle, 0 from the outline on."""
        x0, y0, x1, y1 = self.box
        u, v = (np.abs((np.arange(n) + 0.5) / n * 2 - 1) for n in (x1 - x0, y1 - y0))
        inside: Array = 1 - v[:, None] ** self.exponent - u[None, :] ** self.exponent
        return inside.clip(0)


def quantile(normal: float, quantiles: tuple[float, ...]) -> float:
    """The value at a standard normal's rank, linear between quantiles at equal steps."""
    # A logistic curve stands in for the normal distribution, which numpy lacks: off by 0.01.
    rank = 1 / (1 + np.exp(-1.702 * normal))
    return float(np.interp(rank, np.linspace(0, 1, len(quantiles)), quantiles))


def to_pixels(middle: float, side: float, size: int) -> tuple[int, int]:
    """Half-open pixel range of a side at least 2 pixels long, moved into the image."""
    length = min(max(round(side * size), 2), size)
    start = min(max(round((middle - side / 2) * size), 0), size - length)
    return start, start + length


def step(distance: Array, width: float) -> Array:
    """A smooth edge from 0 to 1 within ``width`` on both sides of a distance of 0."""
    t: Array = (distance / (2 * width) + 0.5).clip(0, 1)
    return t * t * (3 - 2 * t)


def texture(rng: RandomState, cells: int, size: int) -> Array:
    """Smooth noise of standard deviation about 1, (size, size), ``cells`` grains a side."""
    position = (np.arange(size) + 0.5) / size * cells
    # Rows of the matrix interpolate linearly between the grains' values.
    weight = (1 - np.abs(position[:, None] - np.arange(cells + 1)[None, :])).clip(0)
    weight /= np.sqrt((weight**2).sum(1, keepdims=True))
    noise: Array = weight @ rng.standard_normal((cells + 1, cells + 1)) @ weight.T
    return noise


def spots(rng: RandomState, pose: Pose, size: int) -> Array:
    """Small bright spots of healthy chests, (size, size): a pair of nipples, vessels end on."""
    y, spread = rng.uniform(0.1, 0.25), rng.uniform(0.18, 0.28)
    points = [(spread, y), (-spread, y)] if rng.uniform() < 0.4 else []
    sides = rng.choice((-1, 1), size=rng.randint(1, 6))
    points += [(side * rng.uniform(0.1, 0.28), rng.uniform(-0.28, 0.3)) for side in sides]
    place = np.array([pose.to_image(*point) for point in points])
    radius = rng.uniform(0.008, 0.016, len(points))[:, None]
    height = rng.uniform(0.08, 0.25, len(points))[:, None]
    axis = (np.arange(size) + 0.5) / size
    bump_x, bump_y = (np.exp(-(((axis - place[:, i, None]) / radius) ** 2)) for i in (0, 1))
    image: Array = (height * bump_y).T @ bump_x
    return image


def chest(rng: RandomState, pose: Pose, size: int) -> Array:
    """A healthy chest without noise, (size, size), brightness about 0 .. 1."""
    x, y = pose.to_body(size)
    across = np.abs(x)
    air, grain, heart, breast, bone, collar = rng.uniform(
        (0.30, 0.025, 0.10, 0.0, 0.03, 0.02), (0.42, 0.05, 0.15, 0.08, 0.08, 0.14)
    )
    width = LUNG_WIDTH / 2 * (0.93 + 0.3 * y)
    u, v = np.abs((across - LUNG_X) / width), np.abs((y - LUNG_Y) / (LUNG_HEIGHT / 2))
    lung = step(1 - u * u * u - v * v * v, 0.4)
    body = step(0.47 - across - 1.4 * (-y - 0.34).clip(0), 0.03)
    ribs = np.cos(2 * np.pi * (rng.uniform(7.5, 9.5) * (y - 1.4 * across**2) + rng.uniform()))
    core = 0.13 * np.exp(-((x / 0.06) ** 2))
    core += 0.2 * step(1 - ((x - 0.07) / heart) ** 2 - ((y - 0.17) / 0.15) ** 2, 0.6)
    slope = rng.uniform(0.1, 0.5)
    clavicle = np.exp(-(((y + 0.24 + slope * (across - 0.2)) / 0.016) ** 2)) * (across < 0.34)
    hilum = np.exp(-(((across - 0.1) / 0.06) ** 2 + (y / 0.14) ** 2))
    shadow = breast * step(y - rng.uniform(0.02, 0.2), 0.15)
    grains = texture(rng, 24, size)
    tissue = grain * grains + 0.08 * hilum * (1 + 0.6 * grains) + bone * ribs + shadow
    inner = lung * (tissue - air) + core + collar * clavicle
    image: Array = 0.04 + body * (0.6 + 0.05 * texture(rng, 4, size) + inner)
    return image


def draw_opacities(rng: RandomState, pose: Pose, size: int) -> list[Opacity]:
    """One opacity, or one in each lung."""
    side = int(rng.choice((-1, 1)))
    sides = (side, -side) if rng.uniform() < SHARE_WITH_TWO else (side,)
    return [Opacity.draw(rng, pose, side, size) for side in sides]


def draw_image(
    rng: RandomState, pose: Pose, opacities: list[Opacity], size: int, difficulty: float
) -> NDArray[np.uint8]:
    """The whole image, 8 bit; opacities change no pixel outside their outlines."""
    image = chest(rng, pose, size) + spots(rng, pose, size)
    grains = 1 + 0.3 * texture(rng, 20, size)
    for opacity in opacities:
        x0, y0, x1, y1 = opacity.box
        profile = np.minimum(opacity.depth() / 0.5, 1) * opacity.contrast / difficulty
        image[y0:y1, x0:x1] += profile * grains[y0:y1, x0:x1]
    gamma, gain, noise = rng.uniform((0.8, 0.85, 0.01), (1.25, 1.15, 0.03))
    image = gain * image.clip(0) ** gamma + noise * rng.standard_normal((size, size))
    # Rounded to bytes, so that the last digits of one machine's exp do not count.
    byte: NDArray[np.uint8] = (image * 255).round().clip(0, 255).astype(np.uint8)
    return byte


class Phantom(ImageDataModule):
    """Chest-like grey images: about half of them hold one or two opacities in the lungs.

    Pose, lungs, ribs, clavicles, heart, exposure and noise vary; small bright spots are healthy.
    Image i of a split depends on (seed, split, i, size, difficulty) alone. The column "boxes"
    holds the opacities as a JSON list of half-open [x0, y0, x1, y1] in pixels, "opacities" their
    number and "box_share" the share of the image inside their boxes, empty where there are none.

    Args:
        train: Training images.
        val: Validation images.
        test: Test images.
        difficulty: Divides the contrast of the opacities.
        evidence: The mask is the opacities' exact outline, or their boxes.
        loading: Size, channels, batch size and workers.
        augmentation: Geometric augmentation of training batches; None is off.
        seed: Of the images and of their order in training, 0 or more.
        fold: Test fold for cross-validation over all images; None keeps the three splits.
        folds: Number of folds.

    Raises:
        ValueError: If ``difficulty`` is not positive.
    """

    class_names = ("healthy", "opacity")

    def __init__(
        self,
        train: int = 3000,
        val: int = 300,
        test: int = 600,
        difficulty: float = 1.0,
        evidence: Literal["mask", "boxes"] = "mask",
        loading: Loading | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fold: int | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(loading or Loading(size=64), augmentation, seed, fold, folds)
        if difficulty <= 0:
            raise ValueError(f"difficulty must be positive, but got {difficulty}.")
        self.images: dict[Split, int] = {"train": train, "val": val, "test": test}
        self.difficulty, self.evidence = difficulty, evidence

    def records(self) -> list[Record]:
        """Every image; the odd ones have opacities."""
        return [self.record(split, i) for split in SPLITS for i in range(self.images[split])]

    def record(self, split: Split, i: int) -> Record:
        """One image by its number in the split."""
        _, _, opacities = self.plan(split, i)
        boxes = [opacity.box for opacity in opacities]
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        columns = {
            "boxes": json.dumps(boxes) if boxes else "",
            "opacities": str(len(boxes)),
            "box_share": f"{area / self.loading.size**2:.4f}" if boxes else "",
        }
        return Record(f"{split}-{i:05d}", i % 2, split, columns=columns)

    def plan(self, split: Split, i: int) -> tuple[RandomState, Pose, list[Opacity]]:
        """Pose and opacities of an image, and the generator that draws the rest of it."""
        # RandomState, unlike numpy's newer generators, promises the same numbers for ever.
        rng = RandomState([self.seed, SPLITS.index(split), i])
        pose = Pose.draw(rng)
        return rng, pose, draw_opacities(rng, pose, self.loading.size) if i % 2 else []

    def read(self, record: Record) -> Sample:
        """Draw one image and its evidence."""
        split, _, number = record.id.partition("-")
        size = self.loading.size
        rng, pose, opacities = self.plan(split, int(number))  # type: ignore[arg-type]
        image = torch.from_numpy(draw_image(rng, pose, opacities, size, self.difficulty))
        mask = torch.zeros(size, size, dtype=torch.bool)
        for opacity in opacities:
            x0, y0, x1, y1 = opacity.box
            outline = torch.from_numpy(opacity.depth() > 0)
            mask[y0:y1, x0:x1] |= outline if self.evidence == "mask" else True
        return Sample((image.float() / 255).expand(self.loading.channels, -1, -1), mask)
