"""Images a second from the cache of decoded images into the training loop, and into the cache.

python -m benchmarks.loading
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from torchvision.io import encode_png

from datamodules.base import Loading, Record, Sample, Split
from datamodules.decoded import Decoded


class Noise(Decoded):
    """PNG files of noise, half of them with a mask."""

    class_names = ("empty", "half")

    def paths(self) -> dict[str, Path]:
        """Every file."""
        return {path.stem: path for path in sorted(self.folder.glob("*.png"))}

    def records(self) -> list[Record]:
        """All but two images train."""
        splits: dict[int, Split] = {0: "val", 1: "test"}
        return [Record(name, k % 2, splits.get(k, "train")) for k, name in enumerate(self.paths())]

    def read(self, record: Record) -> Sample:
        """An image of the cache."""
        image, _ = self.decoded(record.id)
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[: len(mask) // 2] = True
        return Sample(image, mask if record.label else None)


def exhaust(loader: Iterable[object]) -> None:
    """Take every batch."""
    for _ in loader:
        pass


def rate(count: int, run: Callable[[], object]) -> float:
    """Images a second."""
    start = time.perf_counter()
    run()
    return count / (time.perf_counter() - start)


def main(
    images: int = 3000,
    size: int = 224,
    batch: int = 32,
    decoders: int = 2,
    threads: int = 2,
    epochs: int = 5,
) -> None:
    """Print the rates.

    Args:
        images: PNG files of twice the size.
        size: Side of the decoded images, pixels.
        batch: Images of a batch.
        decoders: Processes that decode.
        threads: Of torch.
        epochs: Of which the median is taken, after one that does not count.
    """
    torch.set_num_threads(threads)
    for what, found in measured(images, size, batch, decoders, epochs).items():
        print(f"{what}: {found:.0f} images of {size} px a second")


def measured(images: int, size: int, batch: int, decoders: int, epochs: int) -> dict[str, float]:
    """Images a second into the cache, from it, and from memory."""
    generator = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        for k in range(images):
            small = torch.rand(1, size // 4, size // 4, generator=generator)
            pixels = (small.repeat_interleave(8, 1).repeat_interleave(8, 2) * 255).byte()
            Path(folder, f"{k:06d}.png").write_bytes(encode_png(pixels).numpy().tobytes())
        into = Noise(folder, loading=Loading(size, batch_size=batch, workers=decoders))
        found = {f"decoded by {decoders} processes": rate(images, into.prepare_data)}
        for in_memory in (False, True):
            data = Noise(folder, loading=Loading(size, batch_size=batch, in_memory=in_memory))
            loader = data.train_dataloader()
            rates = [rate(images, partial(exhaust, loader)) for _ in range(epochs + 1)]
            found["kept in memory" if in_memory else "from the memory map"] = median(rates[1:])
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
