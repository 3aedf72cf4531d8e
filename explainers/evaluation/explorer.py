"""The explorer of a page: maps under a threshold that the reader moves, with live scores."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import encode_png

from explainers.evaluation.metrics.scaling import known, set_range

COLOURS = ("inferno", "viridis", "magma", "cividis")  # perceptually uniform
FILTERED = 12  # most values of a fact that the reader may filter by


@dataclass(frozen=True)
class Case:
    """An image to explore, everything on the CPU.

    Attributes:
        name: Id.
        facts: Label, decision and whatever else is known of it, by name.
        image: RGB (3, h, w) in [0, 1].
        mask: (h, w), True in the evidence; None where it is not annotated.
        maps: (h, w) by explainer; every case has the same explainers. NaN is shown as the lowest.
        generated: Similar and adversarial image (3, h, w), of the explainers that give them.
        scores: By explainer and metric, to sort by.
    """

    name: str
    facts: Mapping[str, str]
    image: Float[Tensor, "3 h w"]
    mask: Bool[Tensor, "h w"] | None
    maps: Mapping[str, Float[Tensor, "h w"]]
    generated: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def explorer(cases: Sequence[Case]) -> Markup:
    """The explorer as a part of a page that stands alone: style, controls, data and script.

    A case is unpacked when it is shown. Empty without cases.
    """
    if not cases:
        return Markup()
    index = {
        "methods": [*cases[0].maps],
        "ranges": [set_range([case.maps[name][None] for case in cases]) for name in cases[0].maps],
        "filters": filters(cases),
        "cases": [
            {"name": case.name, "facts": dict(case.facts), "scores": case.scores} for case in cases
        ],
    }
    packed = [pack(case) for case in cases]
    return section(index, packed)


def section(index: Mapping[str, Any], packed: Sequence[str] = ()) -> Markup:
    """Style, controls, data and script; every text is escaped."""
    folder = files("explainers.evaluation")
    template = Environment(autoescape=True).from_string(
        (folder / "explorer.html").read_text("utf-8")
    )
    known_to_script = dict(index) | {"colours": {name: colours(name) for name in COLOURS}}
    return Markup(
        template.render(
            index=Markup(json.dumps(known_to_script).replace("<", "\\u003c")),
            packed=packed,
            megabytes=sum(map(len, packed)) / 2**20,
            script=Markup((folder / "explorer.js").read_text("utf-8")),
        )
    )


def filters(cases: Sequence[Case]) -> dict[str, list[str]]:
    """Facts with a few values, each shared by two images on average, and these values.

    Probabilities, "p(class)", are left out.
    """
    table = pd.DataFrame([dict(case.facts) for case in cases])
    table = table[[name for name in table if not str(name).startswith("p(")]]
    values = {str(name): sorted(set(table[name].dropna())) for name in table}
    most = min(FILTERED, len(cases) // 2)
    return {name: found for name, found in values.items() if 2 <= len(found) <= most}


def scores_of(scores: pd.DataFrame, forms: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Scores of an image by method and metric: of smoothed maps if there are, in the form shown.

    Args:
        scores: One line per method, views, smoothing and metric.
        forms: "views" or "plain", by method.
    """
    smoothing = "smoothed" if "smoothed" in set(scores["smoothing"]) else "raw"
    found: dict[str, dict[str, float]] = {method: {} for method in forms}
    for line in scores[scores["smoothing"] == smoothing].dropna(subset="value").itertuples():
        if forms.get(str(line.method)) == line.views:
            found[str(line.method)][str(line.metric)] = round(float(str(line.value)), 4)
    return found


def pack(case: Case) -> str:
    """A case as base64 of deflated JSON: images PNG, mask bits, maps 32 bit floats."""
    return base64.b64encode(zlib.compress(json.dumps(content_of(case)).encode(), 6)).decode()


def content_of(case: Case) -> dict[str, Any]:
    """A case as the script reads it."""
    height, width = case.image.shape[1:]
    generated = [case.generated.get(name) for name in case.maps]
    return {
        "height": height,
        "width": width,
        "image": png(case.image),
        "mask": None if case.mask is None else text(np.packbits(case.mask.numpy())),
        "maps": [text(known(one[None]).numpy().astype("<f4")) for one in case.maps.values()],
        "generated": [pair and [png(one) for one in pair] for pair in generated],
    }


def png(image: Float[Tensor, "3 h w"]) -> str:
    """An RGB image in [0, 1] as base64 of a PNG file."""
    return text(encode_png((image.clamp(0, 1) * 255).round().byte()).numpy())


def text(array: NDArray[Any]) -> str:
    """Bytes of an array as base64."""
    return base64.b64encode(array.tobytes()).decode()


def colours(name: str) -> str:
    """256 RGB triples of a colour map, base64."""
    table = mpl.colormaps[name](np.arange(256))[:, :3]
    return text((table * 255).round().astype(np.uint8))
