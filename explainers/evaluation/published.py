"""Tables III to XI of arXiv:2012.07332: one's own values beside the published ones (RSNA)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from explainers.evaluation.tables import markdown

CELL = ["method", "views", "metric"]
CAPTIONS = {
    "III": "boxes of the annotated images: sides in pixels, area in percent",
    "IV": "AUC of f(x_s) and of 1 - f(x_a) against the decisions",
    "V": "SSIM and PSNR of the pairs of images",
    "VI": "IoU of the similar-adversarial explainers",
    "VII": "total and partial AUC of the similar-adversarial explainers",
    "VIII": "IoU against the other methods",
    "IX": "AUC and seconds per image against the other methods",
    "X": "IoU, plain and averaged over views",
    "XI": "AUC and seconds per image, plain and averaged over views",
}


def paper_cells(table: pd.DataFrame, costs: pd.DataFrame, boxes: pd.DataFrame) -> pd.DataFrame:
    """One line per cell of the tables, in their order; raw maps, as the paper has no smoothing.

    Args:
        table: Long form of a comparison: method, views, smoothing, metric, mean, low, high, n.
        costs: Columns method, views, seconds (per image).
        boxes: Sizes of the annotated boxes: rows height, width (pixels), area (percent), columns
            min, max, mean, median.

    Returns:
        Columns table, method, views, metric, published (text as printed, of the RSNA data), mean,
        low, high, n; NaN where the comparison lacks that row.

    Source: arXiv:2012.07332, Tables III to XI. GradCAM is the row "Grad-CAM, last layer" here,
    and "With Augmentations" is "views". Table XI prints .326 for GradCAM, Table IX .324.
    """
    printed = pd.read_csv(
        Path(__file__).with_name("published.csv"), dtype=str, keep_default_na=False
    )
    raw = table[table["smoothing"] == "raw"]
    seconds = costs.groupby(["method", "views"], sort=False)["seconds"].mean().rename("mean")
    parts = [raw, seconds.reset_index().assign(metric="seconds"), box_cells(boxes)]
    own = pd.concat(parts)[[*CELL, "mean", "low", "high", "n"]]
    return printed.merge(own, "left", CELL, validate="many_to_one")


def box_cells(boxes: pd.DataFrame) -> pd.DataFrame:
    """The sizes in long form, one line a cell of Table III."""
    sides, kinds = ["height", "width", "area"], ["min", "max", "mean", "median"]
    cells = [(kind, "", side, boxes.loc[side, kind]) for kind in kinds for side in sides]
    return pd.DataFrame(cells, columns=[*CELL, "mean"])


def paper_page(cells: pd.DataFrame) -> str:
    """The tables as Markdown, each cell "own / published"."""
    parts = ["Each cell: own value / value published for RSNA (arXiv:2012.07332); - where not run."]
    for name, caption in CAPTIONS.items():
        part = cells[cells["table"] == name]
        part = part.assign(text=[cell_text(line) for line in part.itertuples()])
        order = part.loc[part["method"] == part["method"].iloc[-1], "metric"].unique()
        wide = part.set_index(CELL)["text"].unstack("metric", sort=False)[order].fillna("")
        parts.append(f"## Table {name}: {caption}\n\n{markdown(wide.reset_index())}")
    return "\n\n".join(parts)


def cell_text(line: object) -> str:
    """Own and published value; two decimals for PSNR, one for sizes of boxes, three else."""
    mean, printed, metric = (getattr(line, name) for name in ("mean", "published", "metric"))
    digits = 2 if metric.startswith("psnr") else 1 if metric in ("height", "width", "area") else 3
    return f"{mean:.{digits}f} / {printed}" if mean == mean else f"- / {printed}"
