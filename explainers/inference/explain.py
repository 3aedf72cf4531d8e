"""One's own images explained: files in, overlays, maps and a table out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.misc import is_dicom
from rich.progress import Progress
from skimage.measure import label as connected
from skimage.measure import regionprops
from torch import Tensor
from torch.nn.functional import interpolate

from datamodules.images import check_deflated, read_image, resize_image
from explainers.inference.bundle import Answer, Explanation
from explainers.whole import whole, write_whole

ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom"}
TABLE = "results.csv"
Row = dict[str, str]


class Model(NamedTuple):
    """What answers for images of one size.

    Attributes:
        answer: Images (b, c, size, size) in, an `Answer` out, or what files need of it.
        size: Side of the images, pixels.
        channels: 1 or 3.
        class_names: In the order of the decisions.
        settings: Whatever changes the answer, as text: weights, views, smoothing.
    """

    answer: Callable[[Tensor], Answer | Explanation]
    size: int
    channels: Literal[1, 3]
    class_names: Sequence[str]
    settings: str = ""


class Source(NamedTuple):
    """A picture: a file, which of its frames where it has several, whether it is DICOM."""

    path: Path
    frame: int | None = None
    dicom: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """As the table tells it."""
        return str(self.path), "" if self.frame is None else str(self.frame)

    @property
    def name(self) -> str:
        """Of the picture's files: files of one name in two folders differ."""
        place = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        return "_".join([self.path.stem, *([self.key[1]] if self.key[1] else []), place])


def found_files(inputs: Iterable[str]) -> list[Path]:
    """Files that are named: by path, in a folder and those below it, by a pattern, or in a table.

    Args:
        inputs: Of a folder the files with a known ending are taken, and DICOM files without one; a
            table is a CSV with a column ``image``, relative to its own folder.

    Raises:
        ValueError: If an input names nothing, or a table has no such column.
    """
    files: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            every = sorted(p for p in path.rglob("*") if is_picture(p))
        elif path.suffix.lower() == ".csv" and path.is_file():
            every = list(listed_files(path))
        else:
            every = [path] if path.is_file() else [Path(p) for p in sorted(glob(text))]
        if not every:
            raise ValueError(f"{text!r} names no image: give files, folders, patterns or a CSV.")
        files |= dict.fromkeys(every)
    return list(files)


def is_picture(path: Path) -> bool:
    """Whether a file of a folder is meant to be read."""
    ending = path.suffix.lower()
    return ending in ENDINGS or (ending == "" and path.is_file() and is_dicom(path))


def listed_files(table: Path) -> Iterator[Path]:
    """Files of a table's column ``image``."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "image" not in (reader.fieldnames or []):
            columns = ", ".join(reader.fieldnames or [])
            raise ValueError(f"Table {table}: column 'image' is missing; it has {columns}.")
        yield from (table.parent / line["image"] for line in reader)


def pictures_of(path: Path) -> list[Source]:
    """Every frame of a file; one for a file that cannot be read."""
    frames, dicom = 1, False
    try:
        if path.suffix.lower() in {".tif", ".tiff"}:
            with Image.open(path, formats=["TIFF"]) as image:
                frames = getattr(image, "n_frames", 1)
        elif path.suffix.lower() in {".dcm", ".dicom"} or is_dicom(path):
            dicom = True
            with path.open("rb") as file:
                check_deflated(file)
                told = dcmread(file, stop_before_pixels=True).get("NumberOfFrames")
            frames = int(told or 1)
    except Exception:  # told with its reason where it is read
        frames = 1
    if not 1 < frames <= path.stat().st_size:  # a frame of less than a byte is none
        return [Source(path, None, dicom)]
    return [Source(path, frame, dicom) for frame in range(frames)]


def explain_files(
    model: Model,
    inputs: Iterable[str],
    out: Path,
    batch_size: int = 8,
    percentile: float = 95.0,
    workers: int = 1,
) -> list[Row]:
    """Explain files; what an interrupted call finished is not done again.

    Writes, for each picture, <name>.png (the map over the image) and <name>.npy (Float32, height
    and width of the picture as shown), and its line in results.csv: image, frame, name, decision,
    p(class) of each, peak_x, peak_y, boxes (JSON: x0, y0, x1, y1 of the regions above the
    percentile, the largest first), error. For DICOM also <name>_overlay.dcm (Secondary Capture) and
    <name>_region.dcm (Segmentation of the pixels above the percentile).

    Args:
        model: What answers.
        inputs: See `found_files`.
        out: Folder, made if it is not there.
        batch_size: Pictures at a time.
        percentile: Of the map's values, above which a region is told.
        workers: Batches side by side.

    Returns:
        Lines of the pictures that could not be read, or whose DICOM objects could not be written.

    Raises:
        ValueError: If the percentile, the batch size or the number of workers is none, an input
            names nothing, the folder holds what another model or other settings gave, or DICOM
            files are given without the extra that writes them.
    """
    for name, number in (("batch_size", batch_size), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, but got {number}.")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], but got {percentile}.")
    every = [source for path in found_files(inputs) for source in pictures_of(path)]
    if any(source.dicom for source in every) and find_spec("highdicom") is None:
        raise ValueError("DICOM files need the extra dicom: python -m pip install '.[dicom]'.")
    out.mkdir(parents=True, exist_ok=True)
    columns = ["image", "frame", "name", "decision", *(f"p({name})" for name in model.class_names)]
    columns += ["peak_x", "peak_y", "boxes", "error"]
    settings = json.dumps([columns, model.settings, percentile])
    done = finished(out / TABLE, columns, settings, {source.key for source in every})
    # as without a stop: in a batch of other pictures a map is rounded otherwise
    parts = [every[k : k + batch_size] for k in range(0, len(every), batch_size)]
    batches = [[source for source in part if source.key not in done] for part in parts]
    failed: list[Row] = []
    with (
        warnings.catch_warnings(),  # here, as it is not for threads
        Progress() as progress,
        ThreadPoolExecutor(workers) as pool,
        (out / TABLE).open("a", newline="", encoding="utf-8") as file,
    ):
        warnings.filterwarnings("ignore", module="highdicom")  # of names as the source has them
        task = progress.add_task(
            "Explaining", total=len(every), completed=len(every) - sum(map(len, batches))
        )
        writer = csv.DictWriter(file, columns, restval="")
        for rows in pool.map(lambda batch: [*explained(model, batch, out, percentile)], batches):
            writer.writerows(rows)
            file.flush()
            failed += [row for row in rows if row.get("error")]
            progress.advance(task, len(rows))
    return failed


def finished(
    table: Path, columns: Sequence[str], settings: str, wanted: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Pictures whose lines are whole and without an error.

    The table is left with these and with the errors of pictures that are not wanted this time.

    Raises:
        ValueError: If the table was made with other settings.
    """
    rows: list[Row] = []
    told = table.with_name("settings.json")
    if table.is_file():
        if not told.is_file() or told.read_text() != settings:
            raise ValueError(
                f"{table} is of another model or other settings; give another folder or remove it."
            )
        lines = table.read_bytes()  # the last may be half a line, perhaps half a character
        kept = lines[: lines.rfind(b"\r\n") + 2].decode()
        reader = csv.DictReader(io.StringIO(kept, newline=""))
        rows = [row for row in reader if row["error"] is not None]
        rows = [row for row in rows if not row["error"] or key_of(row) not in wanted]
    write_whole(told, settings)
    part = table.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(table)
    return {key_of(row) for row in rows if not row["error"]}


def key_of(row: Row) -> tuple[str, str]:
    """The picture of a line."""
    return row["image"], row["frame"]


def explained(
    model: Model, sources: Sequence[Source], out: Path, percentile: float
) -> Iterator[Row]:
    """Write the files of some pictures and give their lines."""
    read: list[tuple[Source, Tensor]] = []
    for source in sources:
        try:
            read.append((source, read_image(source.path, model.channels, source.frame)))
        except ValueError as error:
            yield {"image": source.key[0], "frame": source.key[1], "error": str(error)}
    if not read:
        return
    answer = model.answer(torch.stack([resize_image(image, model.size) for _, image in read]))
    for k, (source, image) in enumerate(read):
        if not answer.map[k].isfinite().all():
            text = f"The map of {source.path} is not finite: the model fails on this image."
            yield {"image": source.key[0], "frame": source.key[1], "error": text}
            continue
        size = (image.shape[1], image.shape[2])
        heat = interpolate(answer.map[k][None, None], size, mode="bilinear")[0, 0].numpy()
        shown, region = overlay(image, heat), heat > np.percentile(heat, percentile)
        buffer = BytesIO()
        np.save(buffer, heat)  # into a file it loses what a full disk does not take, without a word
        write_whole(out / f"{source.name}.npy", buffer.getvalue())
        with whole(out / f"{source.name}.png") as file:
            Image.fromarray(shown).save(file, "PNG")
        row, column = np.unravel_index(int(heat.argmax()), heat.shape)
        shares = zip(model.class_names, answer.probability[k].tolist(), strict=True)
        yield {
            "image": source.key[0],
            "frame": source.key[1],
            "name": source.name,
            "decision": model.class_names[int(answer.decision[k])],
            **{f"p({name})": f"{share:.6f}" for name, share in shares},
            "peak_x": str(column),
            "peak_y": str(row),
            "boxes": json.dumps(region_boxes(region)),
            "error": dicom_objects(model, source, shown, region, out, percentile),
        }


def dicom_objects(
    model: Model,
    source: Source,
    shown: NDArray[np.uint8],
    region: NDArray[np.bool_],
    out: Path,
    percentile: float,
) -> str:
    """Write the objects of a DICOM picture; what kept them from being written, or nothing."""
    if not source.dicom:
        return ""
    from explainers.inference.dicom import write_objects

    label = f"above percentile {percentile:g}"
    settings = json.dumps([model.settings, percentile])
    try:
        write_objects(source.path, source.frame, shown, region, label, settings, out / source.name)
    except Exception as error:  # of headers that say what highdicom does not expect
        reason = " ".join(str(error).split()).rstrip(".")
        return f"DICOM objects of {source.path} cannot be written: {reason}."
    return ""


def overlay(
    image: Float[Tensor, "c h w"], heat: NDArray[np.float32], strength: float = 0.6
) -> NDArray[np.uint8]:
    """The image in grey, coloured the more the larger the map is: UInt8 (h, w, 3)."""
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / max(high - low, 1e-12)
    colour = mpl.colormaps["inferno"](scaled)[..., :3]
    grey = image.mean(0).numpy()[..., None]
    share = strength * scaled[..., None]
    mixed: NDArray[np.uint8] = (
        (255 * ((1 - share) * grey + share * colour)).round().astype(np.uint8)
    )
    return mixed


def region_boxes(region: NDArray[np.bool_]) -> list[list[int]]:
    """x0, y0, x1, y1 (half-open, pixels) of each connected part, the largest first."""
    regions = regionprops(connected(region))
    regions.sort(key=lambda region: -region.area)
    return [[region.bbox[i] for i in (1, 0, 3, 2)] for region in regions]
