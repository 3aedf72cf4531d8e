"""The HTML page of a comparison."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from jinja2 import Environment
from markupsafe import Markup
from torch import Tensor

from explainers.evaluation import pictures
from explainers.evaluation.explorer import Case, png


@dataclass(frozen=True)
class Picture:
    """One image of the page: an RGB tensor (3, h, w) in [0, 1] under a caption."""

    caption: str
    pixels: Float[Tensor, "3 h w"]

    def data_uri(self, side: int = 160) -> str:
        """PNG of at least ``side`` pixels as a data URI, so that the page stands alone."""
        scale = max(1, round(side / self.pixels.shape[1]))
        larger = self.pixels.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return f"data:image/png;base64,{png(larger)}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem;
       color: #1c2430; background: #fff }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #dde3ea; text-align: left;
         white-space: nowrap; font-variant-numeric: tabular-nums }
th { background: #f3f6f9; position: sticky; top: 0 }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 1.4rem }
figure { margin: 0; width: 164px } figcaption { font-size: 12px; color: #4a5666 }
img { width: 160px; image-rendering: pixelated; border: 1px solid #dde3ea }
.plot { width: min(100%, 55rem); border: 0; image-rendering: auto }
dt { font-weight: 600 } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere }
</style></head><body>
<h1>{{ title }}</h1>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for name, table in tables.items() %}<h2>{{ name }}</h2><div class="wide"><table>
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for line in table.values.tolist() %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
{% if plots %}<h2>Plots</h2>{% for name, uri in plots.items() %}
<img class="plot" alt="{{ name }}" src="{{ uri }}">{% endfor %}{% endif %}
{% if explorer %}<h2>Explorer</h2>{{ explorer }}{% endif %}
<h2>Pictures</h2>
<p>Outline: the annotated evidence. Tinted: the pixels at or above the map's 95th percentile.</p>
{% for name, pictures in gallery.items() %}<h3>{{ name }}</h3><div class="row">
{% for picture in pictures %}<figure>
<img alt="{{ picture.caption }}" src="{{ picture.data_uri() }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}</div>{% endfor %}
</body></html>
"""


def html_page(
    title: str,
    facts: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame],
    gallery: Mapping[str, Sequence[Picture]],
    plots: Mapping[str, bytes] | None = None,
    explorer: Markup | None = None,
) -> str:
    """One self-contained HTML page; every text is escaped, plots are PNG files."""
    template = Environment(autoescape=True).from_string(PAGE)
    uris = {name: png_uri(content) for name, content in (plots or {}).items()}
    return template.render(
        title=title, facts=facts, tables=tables, gallery=gallery, plots=uris, explorer=explorer
    )


def gallery_of(cases: Iterable[Case], most: int) -> dict[str, list[Picture]]:
    """Image, generated images, maps and their top 5 %: a row for each of the first annotated."""
    gallery: dict[str, list[Picture]] = {}
    for case in cases:
        if case.mask is None or len(gallery) == most:
            continue
        image, mask = case.image[None], case.mask[None]
        columns = {"image": pictures.outlined(image, mask)}
        for name, one in case.maps.items():
            if name in case.generated:
                similar, adversarial = case.generated[name]
                columns[f"{name}: similar"] = similar[None]
                columns[f"{name}: adversarial"] = adversarial[None]
            columns[name] = pictures.heat(one[None])
            top = pictures.tinted(image, one[None])
            columns[f"{name}, top 5 %"] = pictures.outlined(top, mask)
        label = f"{case.name} ({case.facts['label']})"
        gallery[label] = [Picture(name, part[0]) for name, part in columns.items()]
    return gallery


def png_uri(content: bytes) -> str:
    """A PNG file as a data URI, so that the page stands alone."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
