"""What explaining an archive of tar shards costs: time linear, memory flat.

python -m benchmarks.archive   # 1000, 10000 and 100000 phantom images of 64 px
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader

from classifiers import Network
from classifiers.memory import keep_freed_memory
from datamodules import Phantom
from datamodules.base import Loading
from explainers.batches import peak_memory
from explainers.inference import Bundle, Explanation
from explainers.inference.archive import Pictures, explain_shards, found_shards
from explainers.inference.explain import Model
from explainers.learned import Distilled, Single
from explainers.learned.generators import Geometry

CPU = torch.device("cpu")


def write_shards(folder: Path, size: int, images: int, count: int) -> None:
    """Draw a shard of PNG files, and give it ``count`` names."""
    phantom = Phantom(images, 3, 3, loading=Loading(size, in_memory=False))
    first = folder / f"{0:06d}.tar"
    with tarfile.open(first, "w") as tar:
        dataset = phantom.dataset("train")
        for k in range(images):
            _, sample = dataset.item(k)
            pixels = (sample.image[0] * 255).round().to(torch.uint8).numpy()
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            info = tarfile.TarInfo(f"{k:06d}.png")
            info.size = content.tell()
            tar.addfile(info, io.BytesIO(content.getvalue()))
    for shard in range(1, count):
        os.link(first, folder / f"{shard:06d}.tar")


def student(size: int) -> tuple[Model, list[float]]:
    """A small untrained Distilled with its classifier, and the CPU seconds of each answer."""
    torch.manual_seed(0)
    network = Network("resnet10t").eval().requires_grad_(False)
    teacher = Single(network, 1, geometry=Geometry(widths=(16, 32, 32, 64)))
    explainer = Distilled(teacher, reduction=1, widths=(8, 16, 32))
    explainer.scale.fill_(1)
    bundle = Bundle(network, explainer, (size, size))
    taken: list[float] = []

    def answer(image: Tensor) -> Explanation:
        start = time.process_time()
        with torch.no_grad():
            found = bundle.explained(image)
        taken.append(time.process_time() - start)
        return found

    return Model(answer, size, 1, network.class_names), taken


def main(
    counts: list[int] = [1000, 10_000, 100_000],  # noqa: B006  its text is in the help
    size: int = 64,
    images: int = 1000,
    batch_size: int = 32,
    workers: int = 0,
    threads: int = 1,
    keep_maps: bool = False,
) -> None:
    """Print a line for each number of images.

    Args:
        counts: Images of an archive, multiples of those of a shard.
        size: Of the images and of the model, pixels.
        images: Of a shard. All shards are one file under many names: reading is from memory.
        batch_size: Images at a time.
        workers: Processes that read.
        threads: Of torch.
        keep_maps: Write the maps too.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    model, taken = student(size)
    for count in counts:
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_shards(folder, size, images, count // images)
            pattern = [str(folder / "*.tar")]
            if count == counts[0]:  # what is done once is left out
                explain_shards(model, pattern, folder / "warm", batch_size)
            peak_memory(CPU, reset=True)
            taken.clear()
            start, worked = time.perf_counter(), time.process_time()
            options = {"workers": workers, "keep_maps": keep_maps}
            explain_shards(model, pattern, folder / "out", batch_size, **options)  # type: ignore[arg-type]
            seconds, worked = time.perf_counter() - start, time.process_time() - worked
            peak = peak_memory(CPU) / 2**20
            parts = [*(folder / "out").glob("*.parquet")]
            rows = sum(parquet.read_metadata(part).num_rows for part in parts)
            size_of_rows = sum(part.stat().st_size for part in parts) / rows
            reading = read_seconds(found_shards(pattern)[:1], model, batch_size) / images
            print(
                f"{rows} images: {seconds:.1f} s, {worked:.1f} s of this process's CPUs, "
                f"{1000 * worked / rows:.3f} ms an image (reading {1000 * reading:.3f}, networks "
                f"{1000 * np.sum(taken) / rows:.3f}), peak {peak:.0f} MB, {size_of_rows:.0f} bytes "
                "a row",
                flush=True,
            )


def read_seconds(shards: list[str], model: Model, batch_size: int) -> float:
    """CPU seconds of reading shards alone, in this process."""
    start = time.process_time()
    for _ in DataLoader(Pictures(shards, model, batch_size), batch_size=None):
        pass
    return time.process_time() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
