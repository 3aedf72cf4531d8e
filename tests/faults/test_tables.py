"""Broken and hostile tables: each is read right, or refused in one sentence with its place."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from files import write_image
from pycocotools import mask as coco

from datamodules.base import Loading
from datamodules.coco import decompressed
from datamodules.image_table import ImageTable

pytestmark = pytest.mark.faults

SIZE, SIDE = 8, 16
HEADER = ["image", "label", "mask", "boxes", "split", "group", "note"]
SPLITS = ["train", "train", "val", "test"]
CLASSES = ["none", "lesion"]
Table = list[list[str]]


class Case(NamedTuple):
    """A table, and what reading it must give: what the intact one gives, or a sentence.

    Attributes:
        content: Of the file.
        told: What the sentence must say (a pattern); "" if the table is to be read; None is either.
        ending: Of the file.
    """

    content: bytes
    told: str | None
    ending: str = ".csv"


def rows() -> Table:
    """Eight images, half of them with a mask or boxes, one patient each."""
    table = [HEADER]
    for k in range(8):
        lesion = k % 2 == 1
        mask = "masks/1.png" if lesion and k < 4 else ""
        boxes = "[[2, 2, 6, 8]]" if lesion and k >= 4 else ""
        split, note = SPLITS[k % 4], f'said "{k}", and\nmore; été'
        table.append([f"images/{k}.png", CLASSES[lesion], mask, boxes, split, f"p{k}", note])
    return table


def annotated() -> dict[str, Any]:
    """The same images in COCO's form, with a polygon, a box, and runs of both kinds."""
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[2:8, 2:6] = 1
    runs = coco.encode(mask)
    shapes = [
        {"segmentation": [[2, 2, 6, 2, 6, 8, 2, 8]]},
        {"bbox": [2, 2, 4, 6]},
        {"segmentation": {"size": [SIDE, SIDE], "counts": runs["counts"].decode()}},
        {"segmentation": {"size": [SIDE, SIDE], "counts": [34, 6, 10, 6, 10, 6, 10, 6, 168]}},
    ]
    names = [line[0] for line in rows()[1:]]
    images = [
        {"id": k, "file_name": name, "split": SPLITS[k % 4], "group": f"p{k}"}
        for k, name in enumerate(names)
    ]
    marks = [{"image_id": 2 * k + 1, "category_id": 5} | shape for k, shape in enumerate(shapes)]
    return {
        "images": images,
        "annotations": marks,
        "categories": [{"id": 5, "name": "lesion"}],
    }


def written(table: Table, encoding: str = "utf-8", **options: Any) -> bytes:
    text = StringIO()
    csv.writer(text, **options).writerows(table)
    return text.getvalue().encode(encoding)


def form(rng: np.random.Generator) -> Case:
    """Encodings, separators and quoting that other programs write."""
    encoding = ["utf-8", "utf-8-sig", "utf-16", "latin-1"][rng.integers(4)]
    told = "line 3: byte 0xe9 is not in UTF-8" if encoding == "latin-1" else ""
    separator = [",", ";", "\t"][rng.integers(3)]
    quoting = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL][rng.integers(2)]
    end = ["\n", "\r\n"][rng.integers(2)]
    options = {"delimiter": separator, "quoting": quoting, "lineterminator": end}
    return Case(written(rows(), encoding, **options), told)


def columns(rng: np.random.Generator) -> Case:
    """Columns moved, missing or twice."""
    table = rows()
    what = rng.integers(4)
    if what == 0:
        order = rng.permutation(len(HEADER))
        return Case(written([[line[k] for k in order] for line in table]), "")
    if what == 1:
        k = int(rng.integers(2))
        told = f"column '{HEADER[k]}' is missing"
        return Case(written([line[:k] + line[k + 1 :] for line in table]), told)
    if what == 2:
        name = HEADER[rng.integers(len(HEADER))]
        return Case(
            written([[*line, name if line is table[0] else ""] for line in table]),
            f"column '{name}' comes twice",
        )
    content = [b"", b"\n\n", written(table[:1]), b"\xef\xbb\xbf"][rng.integers(4)]
    return Case(content, "lists no image|is missing")


def cell(column: str, *values: tuple[str, str]) -> Callable[[np.random.Generator], Case]:
    """One cell with one of the values, and what is told of each."""

    def mutate(rng: np.random.Generator) -> Case:
        table, k = rows(), int(rng.integers(1, 9))
        value, told = values[rng.integers(len(values))]
        table[k][HEADER.index(column)] = value
        place = r"line \d+: [^\n]*" if told and told != UNSPLIT else ""
        return Case(written(table), place + told)

    mutate.__name__ = column
    return mutate


UNSPLIT = "All images or none must name their split, but 1 of 8 name none"
OUTSIDE = "which lies outside"
image = cell(
    "image",
    ("../outside.png", OUTSIDE),
    ("images/../../outside.png", OUTSIDE),
    ("{outside}", OUTSIDE),
    ("/etc/passwd", OUTSIDE),
    ("/dev/zero", OUTSIDE),
    ("linked.png", OUTSIDE),
    ("linked/outside.png", OUTSIDE),
    ("file:///etc/passwd", "which is not a file"),
    ("images/none.png", r"none\.png, which is not a file"),
    ("images", "which is not a file"),
    ("", "must name a file"),
    ("a\0.png", "NUL"),
    ("x" * 5000, "which is not a file"),
    ("x\n.png", "must name a file"),
    ("images/text.png", r"Image .*text\.png cannot be read"),
    ("{inside}", ""),
    ("./images/../images/8.png", ""),
)
mask = cell(
    "mask",
    ("../outside.png", OUTSIDE),
    ("linked.png", OUTSIDE),
    ("masks/none.png", "column 'mask' names .*which is not a file"),
    ("masks/small.png", r"mask .*small\.png must have the image's size 16 x 16, but has 8 x 8"),
    ("images/text.png", r"Image .*text\.png cannot be read"),
)
BOXES = r"boxes must be a JSON list of \[x0, y0, x1, y1\], but got "
boxes = cell(
    "boxes",
    ("[[6, 2, 2, 7]]", r"box \[6.0, 2.0, 2.0, 7.0\] must have"),
    ("[[-1, 2, 2, 7]]", r"box \[-1.0, .* must have"),
    ("[[2, 2, 2, 7]]", "must have finite"),
    ("[[NaN, 2, 4, 7]]", "must have finite"),
    ("[[2, 2, Infinity, 7]]", "must have finite"),
    ("[[1e999, 2, 4, 7]]", "must have finite"),
    ("[[2, 2, 99, 7]]", r"box \[2.0, 2.0, 99.0, 7.0\] must lie inside the image"),
    ("left", BOXES + "'left'"),
    ("[[1, 2, 3]]", BOXES),
    ("[[1, 2, 3, 4, 5]]", BOXES),
    ('[["1", "2", "3", "4"]]', BOXES),
    ('{"1234": 5}', BOXES),
    ('["1234"]', BOXES),
    ("[[true, 2, 3, 4]]", BOXES),
    ("[[1, 2, 3, null]]", BOXES),
    ("7", BOXES),
    (f"[[1, 2, 3, 1{'0' * 400}]]", BOXES),
    (f"[[1, 2, 3, 1{'0' * 5000}]]", BOXES),
    ("[" * 100_000, BOXES),
    (f"[[1, 2, 3, 4]{', [1, 2, 3, 4]' * 20000}]", "this is no CSV .field larger"),
)
label = cell("label", ("", "label '' is unknown"), ("odd", "label 'odd' is unknown"),
             ("x" * 10_000, "label 'x+...' is unknown"), (" none ", None or ""))  # fmt: skip
split = cell("split", ("dev", "split must be train, val, test or empty, but got 'dev'"),
             ("TRAIN", "but got 'TRAIN'"), ("", UNSPLIT))  # fmt: skip


def patient(rng: np.random.Generator) -> Case:
    """One patient in two splits."""
    table = rows()
    a, b = (int(k) for k in rng.choice([1, 2, 3, 4], 2, replace=False))
    table[a][5] = table[b][5] = "Jane"
    leaks = table[a][4] != table[b][4]
    told = r"line \d+: column 'group' has 'Jane' in split '\w+', but Table .*, line \d+ has it in"
    return Case(written(table), told if leaks else "")


def twice(rng: np.random.Generator) -> Case:
    """One image in two lines."""
    table = rows()
    table.append([*table[rng.integers(1, 9)]])
    return Case(written(table), r"line \d+: image 'images/\d.png' is listed twice, first in Table")


def lengths(rng: np.random.Generator) -> Case:
    """Cells too few or too many, as where a file was cut or a quote is missing."""
    table, k = rows(), int(rng.integers(1, 9))
    if rng.random() < 0.5:
        table[k] = table[k][: int(rng.integers(2, 6))]
        return Case(written(table), r"line \d+: there are fewer cells than the 7 columns")
    table[k] = [*table[k], "more"]
    return Case(written(table), r"line \d+: there are more cells than the 7 columns")


def bytewise(rng: np.random.Generator) -> Case:
    """Random bytes, a beginning alone, or quotes where they do not belong."""
    content = bytearray(written(rows()))
    what = rng.integers(3)
    if what == 0:
        for place in rng.integers(len(content), size=int(rng.integers(1, 6))):
            content[place] = rng.integers(256)
    elif what == 1:
        del content[int(rng.integers(len(content))) :]
    else:
        content.insert(int(rng.integers(len(content))), ord('"'))
    return Case(bytes(content), None)


JSON = "is not in COCO's format|COCO's entry"


def coco_form(rng: np.random.Generator) -> Case:
    """JSON in other encodings, cut, nested without end, or of another kind."""
    text = json.dumps(annotated())
    what = rng.integers(5)
    if what == 0:
        encoding = ["utf-8-sig", "utf-16", "utf-32"][rng.integers(3)]
        return Case(text.encode(encoding), "", ".json")
    if what == 1:
        return Case(text[: int(rng.integers(len(text)))].encode(), JSON, ".json")
    if what == 2:
        bomb = ['{"images":', "["][rng.integers(2)] * 200_000
        return Case(bomb.encode(), JSON, ".json")
    if what == 3:
        other = [
            None,
            3,
            "x",
            [],
            {},
            {"images": 1},
            {"images": [], "categories": [], "annotations": []},
        ]
        return Case(json.dumps(other[rng.integers(7)]).encode(), f"{JSON}|lists no image", ".json")
    content = bytearray(text.encode())
    for place in rng.integers(len(content), size=3):
        content[place] = rng.integers(256)
    return Case(bytes(content), None, ".json")


ODD = [None, [], {}, "x", -1, 1.5, True, float("nan"), "../outside.png", [[1]], 10**400]


def coco_entry(rng: np.random.Generator) -> Case:
    """An entry that is missing, or of another kind."""
    content = annotated()
    kind = ["images", "annotations", "categories"][rng.integers(3)]
    entries = content[kind]
    k = int(rng.integers(len(entries)))
    name = list(entries[k])[rng.integers(len(entries[k]))]
    if rng.random() < 0.3:
        del entries[k][name]
    elif rng.random() < 0.2:
        entries[k] = ODD[rng.integers(len(ODD))]
    elif rng.random() < 0.2:
        entries.append(entries[k])
    else:
        entries[k][name] = ODD[rng.integers(len(ODD))]
    return Case(json.dumps(content).encode(), None, ".json")


def coco_shape(rng: np.random.Generator) -> Case:
    """Boxes and outlines that are none, or far outside: what pycocotools would crash on."""
    content = annotated()
    whole = {"size": [SIDE, SIDE]}
    shapes: list[tuple[dict[str, Any], str]] = [
        ({"bbox": [2, 2, -4, 5]}, r"bbox \[2, 2, -4, 5\] must lie inside"),
        ({"bbox": [2, 2, 40, 5]}, "must lie inside the image, which is 16 pixels wide"),
        ({"bbox": [float("nan"), 2, 4, 5]}, "must lie inside"),
        ({"bbox": ["2", 2, 4, 5]}, "a box must be four numbers"),
        ({"bbox": [2, 2, 4]}, "a box must be four numbers"),
        ({"bbox": None}, "a box must be four numbers"),
        ({}, "needs a segmentation or a bbox"),
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, r"polygon .* must lie inside"),
        ({"segmentation": [[0, 0, float("nan"), 0, 4, 4]]}, "must lie inside"),
        ({"segmentation": [[0, 0, 4, 4]]}, "a polygon must be x, y"),
        ({"segmentation": [[0, 0, 4, 4, 4]]}, "a polygon must be"),
        ({"segmentation": [["0", 0, 4, 4, 4, 0]]}, "a polygon must be"),
        ({"segmentation": "0 0 4 4"}, "must be polygons or runs"),
        ({"segmentation": {"size": [99, 99], "counts": [9801]}}, "is for 99 x 99 pixels, but"),
        ({"segmentation": whole | {"counts": [2]}}, "runs must add up to 16 x 16"),
        ({"segmentation": whole | {"counts": [2, -5, 259]}}, "runs must add up"),
        ({"segmentation": whole | {"counts": [2, 100000]}}, "runs must add up"),
        ({"segmentation": whole | {"counts": "zzzzzz"}}, "runs must add up"),
        ({"segmentation": whole | {"counts": "é\0"}}, "runs must add up"),
        ({"segmentation": whole}, "runs must add up"),
        ({"segmentation": {"size": 3}}, "is for 3 pixels"),
    ]
    shape, told = shapes[rng.integers(len(shapes))]
    content["annotations"][1] = {"image_id": 3, "category_id": 5} | shape
    return Case(json.dumps(content).encode(), f"image 3: .*{told}", ".json")


KINDS = [
    form, form, columns, image, image, image, mask, boxes, boxes, boxes, label, split, patient,
    twice, lengths, bytewise, bytewise, coco_form, coco_entry, coco_entry, coco_shape, coco_shape,
]  # fmt: skip


def cases(count: int) -> Iterator[tuple[str, Case]]:
    for index in range(count):
        mutate = KINDS[index % len(KINDS)]
        yield mutate.__name__, mutate(np.random.default_rng([11, index]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What tables name, a file outside of it, and links to that."""
    root = tmp_path / "data" / "mine"
    for k in range(9):
        write_image(root / "images" / f"{k}.png", np.full((SIDE, SIDE), 20 * k, np.uint8))
    outline = np.zeros((SIDE, SIDE), np.uint8)
    outline[2:8, 2:6] = 255
    write_image(root / "masks" / "1.png", outline)
    write_image(root / "masks" / "small.png", outline[:8, :8])
    (root / "images" / "text.png").write_text("no image")
    write_image(tmp_path / "outside.png", outline)
    write_image(tmp_path / "data" / "outside.png", outline)
    (root / "linked.png").symlink_to(tmp_path / "outside.png")
    (root / "linked").symlink_to(tmp_path)
    return root


def table_of(root: Path, name: str, **options: Any) -> ImageTable:
    loading = Loading(size=SIZE, in_memory=False)
    return ImageTable(str(root / name), CLASSES, loading=loading, **options)


def given(root: Path, name: str) -> str:
    """The sentence that a table is refused with; "" if all of it can be read."""
    try:
        data = table_of(root, name)
        data.setup()
        samples = [data.read(record) for record in data.records()]
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"!{error!r}"
    masks = [int(sample.mask.sum()) for sample in samples if sample.mask is not None]
    return "" if len(samples) == 8 and 3 <= len(masks) <= 5 else f"!read {len(samples)}, {masks}"


@pytest.mark.parametrize("count", [110, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_tables(
    count: int, folder: Path, tell_fault: Callable[[str, int, int], None]
) -> None:
    lost = []
    for index, (kind, case) in enumerate(cases(count)):
        name = f"{index}{case.ending}"
        content = case.content.replace(
            b"{outside}", str(folder.parent.parent / "outside.png").encode()
        )
        content = content.replace(b"{inside}", str(folder / "images" / "8.png").encode())
        (folder / name).write_bytes(content)
        told = given(folder, name)
        sentence = rf"Table {re.escape(str(folder / name))}[^\n]*[^.]\."
        good = told == "" or (re.fullmatch(sentence, told) and len(told) < 6000)
        if case.told is not None:
            good = good and bool(told) == bool(case.told) and re.search(case.told, told)
        elif told.startswith("!read"):
            good = True  # what was cut or changed may be a table of fewer images
        if not good:
            lost.append((kind, name, case.told, told[:300]))
    tell_fault("tables: mutated files", count, count - len(lost))
    assert lost == []


def test_intact_tables_are_read(folder: Path) -> None:
    (folder / "a.csv").write_bytes(written(rows()))
    (folder / "a.json").write_text(json.dumps(annotated()))
    assert given(folder, "a.csv") == given(folder, "a.json") == ""
    by_table, by_coco = (table_of(folder, name) for name in ("a.csv", "a.json"))
    for one, other in zip(by_table.records(), by_coco.records(), strict=True):
        first, second = by_table.read(one).mask, by_coco.read(other).mask
        assert (one.split, one.group, one.label) == (other.split, other.group, other.label)
        assert (first is None) == (second is None) == (one.label == 0)
        assert first is None or second is None or first.equal(second)


def test_other_roots_are_allowed_where_they_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the option; a table in the data root may name all files of it."""
    outside = folder.parent.parent / "outside.png"
    for value in (str(outside), "linked.png", "linked/outside.png"):
        table = rows()
        table[1][0] = value
        (folder / "a.csv").write_bytes(written(table))
        with pytest.raises(ValueError, match=OUTSIDE):
            table_of(folder, "a.csv").records()
        assert len(table_of(folder, "a.csv", roots=[str(folder.parent.parent)]).records()) == 8
    table = rows()
    table[1][0] = "../outside.png"
    (folder / "a.csv").write_bytes(written(table))
    monkeypatch.setenv("SIMADV_DATA", str(folder.parent))
    assert len(ImageTable("mine/a.csv", CLASSES).records()) == 8
    (folder.parent.parent / "link").symlink_to(folder.parent)
    monkeypatch.setenv("SIMADV_DATA", str(folder.parent.parent / "link"))
    assert len(ImageTable("mine/a.csv", CLASSES).records()) == 8


def test_a_fold_takes_patients_as_they_are(folder: Path) -> None:
    """The table's splits do not count then, and the folds keep a patient together."""
    table = rows()
    table[1][5] = table[3][5] = "Jane"
    (folder / "a.csv").write_bytes(written(table))
    data = table_of(folder, "a.csv", fold=0, folds=3)
    data.setup()
    homes = {name for name, members in data.splits.items() for r in members if r.group == "Jane"}
    assert len(homes) == 1


def test_compressed_runs_agree_with_pycocotools() -> None:
    generator = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        drawn = np.asfortranarray(generator.random((37, 53)) < share).astype(np.uint8)
        runs = decompressed(coco.encode(drawn)["counts"].decode())
        flat = np.repeat(np.arange(len(runs)) % 2, runs)
        np.testing.assert_array_equal(flat.reshape(53, 37).T, drawn)
