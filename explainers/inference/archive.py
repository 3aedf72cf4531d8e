"""An archive explained: tar shards are streamed, one Parquet file of rows for each comes out."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from pyarrow import parquet
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import WebDataset
from webdataset.shardlists import expand_urls

from datamodules.images import read_image, resize_image
from explainers.inference.explain import ENDINGS, Model, Row, region_boxes

GROUP = 256  # rows kept in memory before they go into a row group of the file
SETTINGS = "settings.json"
Line = dict[str, Any]
A = TypeVar("A")
B = TypeVar("B")


class Part(NamedTuple):
    """Some pictures of a shard as read.

    Attributes:
        shard: Where they come from.
        lines: Of every picture: key, height, width, and error where it could not be read.
        image: Those that could, at the model's size; None where there are none.
        last: Whether the shard ends here.
        error: Why it could not be read to its end.
    """

    shard: str
    lines: Sequence[Line]
    image: Float[Tensor, "b c h w"] | None = None
    last: bool = False
    error: str = ""


class Pictures(IterableDataset[Part]):
    """Pictures of shards, a few at a time; each worker of a loader reads whole shards."""

    def __init__(self, shards: Sequence[str], model: Model, batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size
        self.channels, self.size = model.channels, model.size

    def __iter__(self) -> Iterator[Part]:
        """Yield the parts of each shard, then one that ends it."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[first::step]:
            try:
                check_end(shard)
                # only sharing shards among workers, processes and machines is left to us
                stream = WebDataset(
                    [shard],
                    nodesplitter=None,
                    workersplitter=None,
                    shardshuffle=False,
                    empty_check=False,
                )
                for samples in stream.batched(self.batch_size, collation_fn=None):
                    yield self.read(shard, samples)
            except (OSError, ValueError, tarfile.TarError) as error:
                yield Part(shard, [], last=True, error=f"Shard {shard} cannot be read: {error}")
            else:
                yield Part(shard, [], last=True)

    def read(self, shard: str, samples: Sequence[Mapping[str, Any]]) -> Part:
        """Decode and resize the images of samples."""
        lines, images = list[Line](), list[Tensor]()
        for sample in samples:
            key = sample["__key__"]
            lines.append({"key": key, "error": ""})
            try:
                name, content = image_member(sample)
                image = read_image(f"{shard}/{key}.{name}", self.channels, content=content)
            except ValueError as error:
                lines[-1]["error"] = str(error)
                continue
            lines[-1] |= {"height": image.shape[1], "width": image.shape[2]}
            images.append(resize_image(image, self.size))
        return Part(shard, lines, torch.stack(images) if images else None)


def image_member(sample: Mapping[str, Any]) -> tuple[str, bytes]:
    """Ending and content of a sample's image."""
    for name, content in sample.items():
        if f".{name}" in ENDINGS:
            return name, content
    names = ", ".join(name for name in sample if not name.startswith("__"))
    raise ValueError(f"Sample {sample['__key__']!r} holds no image: it has {names}.")


def check_end(shard: str) -> None:
    """Refuse a local file that was cut off: its readers take a missing end for the end."""
    if is_remote(shard):
        return  # the program that fetches it tells by its exit code
    with Path(shard).open("rb") as file:
        file.seek(-min(1024, Path(shard).stat().st_size), os.SEEK_END)
        if file.read() != bytes(1024):
            raise ValueError("it has no end mark, as one that was cut off; fetch it again.")


def is_remote(text: str) -> bool:
    """Whether an input is no local file."""
    return text.startswith("pipe:") or "://" in text


def found_shards(inputs: Iterable[str]) -> list[str]:
    """Shards that are named: by path, by a pattern, by braces ({000..123}), by URL or as a pipe.

    Raises:
        ValueError: If an input names none.
    """
    shards: dict[str, None] = {}
    for text in inputs:
        for name in expand_urls(text):
            every = [name] if is_remote(name) or Path(name).is_file() else sorted(glob(name))
            if not every:
                raise ValueError(f"{name!r} names no shard: give tar files, patterns or URLs.")
            shards |= dict.fromkeys(every)
    return list(shards)


def part_file(out: Path, shard: str) -> Path:
    """Where the rows of a shard go: shards of one name in two places differ."""
    place = hashlib.sha256(shard.encode()).hexdigest()[:8]
    return out / f"{Path(shard.split()[-1]).stem}_{place}.parquet"


def explain_shards(
    model: Model,
    inputs: Iterable[str],
    out: Path,
    batch_size: int = 8,
    percentile: float = 95.0,
    workers: int = 0,
    keep_maps: bool = False,
    devices: int = 1,
) -> list[Row]:
    """Explain the pictures of shards; those of finished shards are not explained again.

    Writes <shard>_<hash>.parquet for each shard, whole or not at all, with a row for each picture
    in the shard's order: key, height, width, decision, p(class) of each, peak_x, peak_y, boxes
    (x0, y0, x1, y1 of the regions above the percentile, the largest first), error, and map (rows of
    float16 of the model's size). Regions are found at the model's size and told in pixels of the
    picture. Several calls may write into one folder if no two are given the same shard.

    Args:
        model: What answers.
        inputs: See `found_shards`; WebDataset's form: files of one name up to its first dot are a
            sample.
        out: Folder, made if it is not there.
        batch_size: Pictures at a time.
        percentile: Of the map's values, above which a region is told.
        workers: Processes that read shards, each its own; 0 reads in this one.
        keep_maps: Write the maps too.
        devices: Batches side by side.

    Returns:
        Lines of the pictures and shards that could not be read.

    Raises:
        ValueError: If a number is none, an input names no shard, or the folder holds what another
            model or other settings gave.
    """
    least = {"batch_size": (batch_size, 1), "workers": (workers, 0), "devices": (devices, 1)}
    for name, (number, low) in least.items():
        if number < low:
            raise ValueError(f"{name} must be {low} or more, but got {number}.")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], but got {percentile}.")
    shards = found_shards(inputs)
    schema = schema_of(model, keep_maps)
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / SETTINGS, json.dumps([schema.names, model.settings, percentile]))
    left = [shard for shard in shards if not part_file(out, shard).exists()]
    loader = DataLoader(Pictures(left, model, batch_size), batch_size=None, num_workers=workers)
    growing: dict[str, Growing] = {}
    failed = list[Row]()

    def answered(part: Part) -> tuple[Part, list[Line]]:
        return part, list(explained(model, part, percentile, keep_maps))

    with Progress() as progress, ThreadPoolExecutor(devices) as pool:
        task = progress.add_task("Shards", total=len(shards), completed=len(shards) - len(left))
        for part, lines in side_by_side(pool, answered, loader, devices):
            if part.shard not in growing:
                growing[part.shard] = Growing(part_file(out, part.shard), schema)
            growing[part.shard].add(lines)
            if part.last:
                growing.pop(part.shard).close(whole=not part.error)
                progress.advance(task)
            if part.error:
                failed.append({"image": part.shard, "error": part.error})
    for shard in shards:
        if part_file(out, shard).exists():
            failed += errors_of(shard, part_file(out, shard))
    return failed


def schema_of(model: Model, keep_maps: bool) -> pa.Schema:
    """Columns of a shard's rows."""
    columns = [("key", pa.string()), ("height", pa.int32()), ("width", pa.int32())]
    columns += [("decision", pa.string())]
    columns += [(f"p({name})", pa.float32()) for name in model.class_names]
    columns += [("peak_x", pa.int32()), ("peak_y", pa.int32())]
    columns += [("boxes", pa.list_(pa.list_(pa.int32()))), ("error", pa.string())]
    return pa.schema(columns + ([("map", pa.binary())] if keep_maps else []))


def check_settings(path: Path, settings: str) -> None:
    """Leave the settings beside the parts, or refuse a folder of others."""
    if path.is_file():
        if path.read_text() != settings:
            raise ValueError(
                f"{path.parent} is of another model or other settings; give another folder or "
                "remove it."
            )
        return
    own = path.with_suffix(f".{os.getpid()}")  # other calls may be doing the same
    own.write_text(settings)
    own.replace(path)


class Growing:
    """Rows of a shard on their way to a file, which is there when it is whole."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.lines = path, schema, list[Line]()
        self.growing = path.with_suffix(".growing")
        self.writer = parquet.ParquetWriter(self.growing, schema, compression="zstd")

    def add(self, lines: Sequence[Line]) -> None:
        """Take in rows, and write them once there are enough."""
        self.lines += lines
        if len(self.lines) >= GROUP:
            self.write()

    def write(self) -> None:
        """Write the rows that are in memory."""
        self.writer.write_table(pa.Table.from_pylist(self.lines, self.schema))
        self.lines = []

    def close(self, whole: bool) -> None:
        """Give the file its name, or remove it."""
        if self.lines:
            self.write()
        self.writer.close()
        if whole:
            self.growing.replace(self.path)
        else:
            self.growing.unlink()


def explained(model: Model, part: Part, percentile: float, keep_maps: bool) -> Iterator[Line]:
    """Rows of some pictures."""
    if part.image is None:
        yield from part.lines
        return
    answer = model.answer(part.image)
    places = iter(range(len(part.image)))
    for line in part.lines:
        if line["error"]:
            yield line
            continue
        k = next(places)
        heat = answer.map[k].float().numpy()
        if not np.isfinite(heat).all():
            text = f"The map of {part.shard}/{line['key']} is not finite: the model fails on it."
            yield {**line, "error": text}
            continue
        down, right = line["height"] / heat.shape[0], line["width"] / heat.shape[1]
        row, column = np.unravel_index(int(heat.argmax()), heat.shape)
        boxes = np.array(region_boxes(heat > np.percentile(heat, percentile))).reshape(-1, 4)
        shares = zip(model.class_names, answer.probability[k].tolist(), strict=True)
        yield {
            **line,
            "decision": model.class_names[int(answer.decision[k])],
            **{f"p({name})": share for name, share in shares},
            "peak_x": int((column + 0.5) * right),
            "peak_y": int((row + 0.5) * down),
            "boxes": (boxes * [right, down, right, down]).round().astype(int).tolist(),
            **({"map": heat.astype(np.float16).tobytes()} if keep_maps else {}),
        }


def side_by_side(
    pool: ThreadPoolExecutor, call: Callable[[A], B], items: Iterable[A], count: int
) -> Iterator[B]:
    """Results in order, ``count`` ahead at most: the pool's own map would read all items first."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def errors_of(shard: str, path: Path) -> list[Row]:
    """Lines of the pictures of a finished shard that could not be read."""
    table = parquet.read_table(path, columns=["key", "error"], filters=[("error", "!=", "")])
    return [
        {"image": f"{shard}/{line['key']}", "error": line["error"]} for line in table.to_pylist()
    ]
