"""Times the localisation scores against plain numpy loops: python -m benchmarks.scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray

from benchmarks.stopwatch import seconds
from explainers.evaluation.metrics.localisation import localisation_scores

Loop = Callable[[NDArray[np.float32], NDArray[np.bool_]], list[tuple[float, float]]]


def loop(saliency: NDArray[np.float32], mask: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Total and partial AUC, one percentile of one map after the other."""
    return [
        _areas(one, inside, [np.percentile(one, p) for p in range(100)])
        for one, inside in zip(saliency, mask, strict=True)
    ]


def better_loop(
    saliency: NDArray[np.float32], mask: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """The same, with one call for the percentiles of a map."""
    return [
        _areas(one, inside, list(np.percentile(one, range(100))))
        for one, inside in zip(saliency, mask, strict=True)
    ]


def _areas(
    one: NDArray[np.float32], inside: NDArray[np.bool_], thresholds: list[np.floating]
) -> tuple[float, float]:
    predicted = [one >= threshold for threshold in thresholds]
    hits = np.array([(kept & inside).sum() for kept in predicted])
    precision, recall = hits / [kept.sum() for kept in predicted], hits / inside.sum()
    return -np.trapezoid(precision, recall), -np.trapezoid(precision[80:], recall[80:])


def main(
    device: str = "cpu", size: int = 224, maps: int = 64, repeats: int = 5, threads: int = 2
) -> None:
    """Print milliseconds per map and the ratios.

    Args:
        device: Of `localisation_scores`; the loops run on the CPU.
        size: Side of the maps, pixels.
        maps: Number of maps in the batch.
        repeats: Calls of which the median is taken.
        threads: Of torch on the CPU.
    """
    torch.set_num_threads(threads)
    ours, loops = measured(device, size, maps, repeats)
    print(f"localisation_scores on {device}: {ours:.2f} ms per map of {size} x {size}")
    for name, slow in loops.items():
        print(f"{name}: {slow:.2f} ms per map, {slow / ours:.1f} times ours")


def measured(
    device: str, size: int, maps: int, repeats: int, loops: Sequence[Loop] = (loop, better_loop)
) -> tuple[float, dict[str, float]]:
    """Milliseconds per map: ours, and each loop's by its name."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(maps, size, size, generator=generator)
    mask = torch.zeros(maps, size, size, dtype=torch.bool)
    mask[:, : size // 3, : size // 4] = True
    plain, inside = saliency.numpy(), mask.numpy()
    there, masks = saliency.to(device), mask.to(device)
    ours = seconds(partial(localisation_scores, there, masks), repeats) * 1000 / maps
    return ours, {
        run.__name__: seconds(partial(run, plain, inside), repeats) * 1000 / maps for run in loops
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
