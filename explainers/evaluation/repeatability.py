"""Do two trainings give the same maps? (Arun et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from explainers.evaluation.compare import long_form
from explainers.evaluation.figures import png
from explainers.evaluation.metrics.consistency import map_ssim, spearman
from explainers.evaluation.statistics import intervals_by
from explainers.evaluation.tables import interval_text, markdown

Rows = list[dict[str, object]]
KEY = ["method", "pair", "metric"]


class Training(NamedTuple):
    """One of several trained classifiers: its architecture and its number among those."""

    architecture: str
    number: int

    def __str__(self) -> str:
        return f"{self.architecture} {self.number}"


def pair_scores(method: str, maps: Mapping[Training, Tensor], ids: Sequence[str]) -> Rows:
    """Spearman and SSIM of every image's maps, for every pair of trainings.

    Args:
        method: Name of the method.
        maps: Of the same images, (b, h, w), for each training.
        ids: Of the images.
    """
    rows: Rows = []
    for one, two in combinations(maps, 2):
        within = one.architecture == two.architecture
        facts = {"method": method, "pair": "within" if within else "between"}
        pair = {"first": str(one), "second": str(two)}
        scores = {
            "spearman": spearman(maps[one], maps[two]),
            "ssim": map_ssim(maps[one], maps[two]),
        }
        rows += long_form(ids, scores, facts | pair)
    return rows


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval over images, of pairs within and between architectures.

    "within" is repeatability, "between" reproducibility. Of several pairs the mean per image is
    taken first, so that n counts images.

    Args:
        scores: Columns id, group, method, pair, first, second, metric, value.
    """
    means = scores.groupby([*KEY, "id", "group"], sort=False)["value"].mean().reset_index()
    return intervals_by(means, KEY)


def matrix(scores: pd.DataFrame, method: str, metric: str = "spearman") -> pd.DataFrame:
    """Mean over images for every pair of trainings; symmetric, 1 on the diagonal."""
    part = scores[(scores["method"] == method) & (scores["metric"] == metric)]
    means = part.groupby(["first", "second"], sort=False)["value"].mean()
    names = list(dict.fromkeys([*part["first"], *part["second"]]))
    table = pd.DataFrame(1.0, index=names, columns=names)
    for line in means.reset_index().to_dict("records"):
        one, two = line["first"], line["second"]
        table.loc[one, two] = table.loc[two, one] = line["value"]
    return table


def drawn(table: pd.DataFrame, title: str) -> bytes:
    """PNG of a `matrix`, its values written in."""
    side = 2.5 + 0.5 * len(table)
    figure = Figure((side, side), 110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(table)), [str(name) for name in table.columns], rotation=90)
    axes.set_yticks(range(len(table)), [str(name) for name in table.index])
    for row, values in enumerate(table.to_numpy().tolist()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w", fontsize=8)
    axes.set_title(title, fontsize=9)
    return png(figure)


def write(scores: pd.DataFrame, out: Path) -> None:
    """Write repeatability_scores.csv, repeatability.csv, .md and a matrix for every method.

    Args:
        scores: Of `summary`.
        out: Folder, made if it is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / "repeatability_scores.csv", index=False)
    table = summary(scores)
    table.to_csv(out / "repeatability.csv", index=False)
    text = table.assign(value=[interval_text(line) for line in table.itertuples()])
    wide = text.set_index(KEY)["value"].unstack(["metric", "pair"], sort=False).fillna("")
    wide.columns = [" ".join(map(str, names)) for names in wide.columns]
    parts = [markdown(wide.reset_index())]
    for method in scores["method"].unique():
        each = matrix(scores, method)
        name = f"repeatability_{method}".replace("/", " ")
        (out / f"{name}.png").write_bytes(drawn(each, f"{method}: Spearman"))
        rounded = each.round(3).rename_axis("Spearman").reset_index().astype(str)
        parts.append(f"## {method}\n\n{markdown(rounded)}")
    (out / "repeatability.md").write_text("\n\n".join(parts))
