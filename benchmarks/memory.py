"""Peak memory of a training step, and the largest batch that a budget allows.

python -m benchmarks.memory   # Duo of arXiv:2012.07332, 224 px, ResNet50, 8 GB
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Literal

import torch
from jsonargparse import auto_cli

from classifiers import Network
from explainers.batches import peak_memory
from explainers.learned import Duo, Single
from explainers.learned.generators import Geometry
from explainers.learned.similar_adversarial import SimilarAdversarial

Kind = Literal["Duo", "Single"]


def built(kind: Kind) -> SimilarAdversarial:
    """The explainer of the presets of configs/rsna, untrained."""
    network = Network("resnet50").eval().requires_grad_(False)
    geometry = Geometry("residual", (16, 32, 64), 1, "clip")
    return Duo(network, geometry=geometry) if kind == "Duo" else Single(network, geometry=geometry)


def step_memory(kind: Kind, size: int, batch: int, bf16: bool, threads: int, place: str) -> float:
    """Peak megabytes of two steps, those of the process before it worked included."""
    torch.set_num_threads(threads)
    device = torch.device(place)
    peak_memory(device, reset=True)
    explainer = built(kind).to(device).train()
    explainer.network.eval()
    image = torch.rand(batch, 1, size, size, device=device)
    optimizer = torch.optim.Adam([p for p in explainer.parameters() if p.requires_grad])
    for _ in range(2):  # the second has Adam's averages
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms, _ = explainer.objective(image)
        terms["loss"].backward()
        optimizer.step()
    return peak_memory(device) / 2**20


def main(
    kind: Kind = "Duo",
    size: int = 224,
    batches: list[int] = [1, 2, 4],  # noqa: B006  its text is in the help
    megabytes: int = 8192,
    bf16: bool = False,
    threads: int = 2,
    device: str = "cpu",
) -> None:
    """Print the peak of each batch, each in a process of its own, then of the largest that fits.

    Args:
        kind: Duo or Single.
        size: Of the images, pixels.
        batches: Numbers of images; from the last two the largest batch is reckoned, then measured.
        megabytes: Budget.
        bf16: As with --trainer.precision bf16-mixed.
        threads: Of torch on the CPU.
        device: Of both.
    """
    found = {batch: measured(kind, size, batch, bf16, threads, device) for batch in batches}
    (small, less), (large, more) = [*found.items()][-2:]
    each = (more - less) / (large - small)
    fits = int((megabytes - more) / each) + large
    print(f"{each:.0f} MB an image: {fits} images should fit into {megabytes} MB")
    while measured(kind, size, fits, bf16, threads, device) > megabytes:
        fits -= 1


def measured(kind: Kind, size: int, batch: int, bf16: bool, threads: int, device: str) -> float:
    """`step_memory` in a process of its own, printed."""
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=own) as pool:
        peak = pool.submit(step_memory, kind, size, batch, bf16, threads, device).result()
    print(f"{kind}, {size} px, batch {batch}: {peak:.0f} MB", flush=True)
    return peak


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
