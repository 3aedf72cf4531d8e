"""Does a map change with the classifier it explains? (Adebayo et al. 2018; Arun et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from classifiers.network import Network
from explainers.base import Explainer
from explainers.evaluation.compare import long_form
from explainers.evaluation.figures import curves
from explainers.evaluation.metrics.consistency import map_ssim, spearman
from explainers.evaluation.metrics.localisation import average_precision
from explainers.evaluation.metrics.overlap import area_matched
from explainers.evaluation.statistics import intervals_by
from explainers.evaluation.tables import interval_text, markdown
from explainers.views import Views

Order = Literal["cascading", "independent", "labels", "retrained"]
Rows = list[dict[str, object]]
KEY = ["method", "order", "step", "layers", "metric"]
METRICS = ("spearman", "ssim", "dice", "average_precision")
INSENSITIVE = 0.5  # Spearman's correlation with the original map
RANDOM = "Random map"


class State(NamedTuple):
    """A changed classifier.

    Attributes:
        order: How it was changed; step 0 is the classifier as it was.
        step: Number of changes so far; 0 is none.
        layers: What was changed last, as text.
        network: The classifier.
    """

    order: Order
    step: int
    layers: str
    network: Network


def map_scores(
    original: Float[Tensor, "b h w"], changed: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> dict[str, Float[Tensor, " b"]]:
    """How like the original map the changed one is, and how well it still finds the evidence."""
    return {
        "spearman": spearman(original, changed),
        "ssim": map_ssim(original, changed),
        "dice": area_matched(changed, mask).dice,
        "average_precision": average_precision(changed, mask),
    }


def score_states(
    name: str,
    build: Callable[[Network], Explainer],
    states: Iterable[State],
    batches: Sequence[Mapping[str, Any]],
    views: Views | None = None,
    *,
    keeps_target: bool = True,
) -> Rows:
    """Scores of one method's maps at every state, the first of which is the original.

    Args:
        name: Of the method.
        build: The method for a classifier.
        states: The classifier as it is, then the changed ones.
        batches: Annotated images: id, image, mask.
        views: Geometric views to average over.
        keeps_target: Explain the class that the original classifier decided; learned explainers
            can only explain the changed one's own decision.
    """
    rows: Rows = []
    originals: list[tuple[Tensor, Tensor]] = []
    for state in states:
        explainer = build(state.network)
        for k, batch in enumerate(batches):
            image, mask = batch["image"], batch["mask"]
            if len(originals) == k:
                target = state.network.decide(image)
                maps = explainer.explain(image, target, views)
                originals.append((target, maps))
            else:
                target = originals[k][0]
                maps = explainer.explain(image, target if keeps_target else None, views)
            facts = {"method": name, **state._asdict()}
            del facts["network"]
            rows += long_form(batch["id"], map_scores(originals[k][1], maps, mask), facts)
    return rows


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and bootstrap interval over images of every method, state and metric, in long form.

    Args:
        scores: Columns id, group, method, order, step, layers, metric, value.
    """
    return intervals_by(scores, KEY)


def verdicts(table: pd.DataFrame, kept: Collection[str] = ()) -> pd.DataFrame:
    """One line per method: is it sensitive to the classifier, and does it say anything?

    Insensitive: at the last step of an order the lower bound of Spearman's correlation with the
    original map is above 0.5. Uninformative: the interval of average precision of the original map
    covers the random map's mean. Both rules are this project's own.

    Args:
        table: Of `summary`; the random map among its methods.
        kept: Learned explainers that were kept, not trained for the changed classifier.

    Raises:
        ValueError: If the random map was not scored.
    """
    if RANDOM not in set(table["method"]):
        raise ValueError(f"verdicts need the control {RANDOM!r} among the methods.")
    lines = table.to_dict("records")
    precision = {
        line["method"]: line
        for line in lines
        if line["step"] == 0 and line["metric"] == "average_precision"
    }
    last = {
        (line["method"], line["order"]): line
        for line in lines  # steps ascend: the last one stays
        if line["step"] > 0 and line["metric"] == "spearman"
    }
    random = precision[RANDOM]["mean"]
    rows = []
    for (method, order), line in last.items():
        own = precision[method]
        words = ["insensitive"] * bool(line["low"] > INSENSITIVE)
        words += ["uninformative"] * bool(own["low"] <= random <= own["high"])
        verdict = ", ".join(words) or "sensitive"
        if method in kept and order != "retrained":
            verdict += ": kept, not trained for the changed classifier; retrain it"
        figures = [line[name] for name in ("mean", "low", "high")]
        rows.append((method, order, *figures, own["mean"], verdict))
    columns = ["method", "order", "spearman", "low", "high", "average precision", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def write(scores: pd.DataFrame, kept: Collection[str], out: Path, name: str, across: str) -> None:
    """Write <name>_scores.csv, <name>.csv, <name>.md with the verdicts, and a plot of each figure.

    Args:
        scores: Of `summary`.
        kept: Of `verdicts`.
        out: Folder, made if it is not there.
        name: Of the files.
        across: Label of the steps.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / f"{name}_scores.csv", index=False)
    table = summary(scores)
    table.to_csv(out / f"{name}.csv", index=False)
    figures = table[table["step"] == table.groupby("order")["step"].transform("max")]
    text = figures.assign(value=[interval_text(line) for line in figures.itertuples()])
    wide = text.set_index(["method", "order", "metric"])["value"].unstack("metric", sort=False)
    rounded = verdicts(table, kept).round(3).astype(str)
    parts = ["## Verdicts", markdown(rounded), "## At the last step", markdown(wide.reset_index())]
    (out / f"{name}.md").write_text("\n\n".join(parts))
    for metric in METRICS:
        steps = table[table["order"] != "retrained"]
        (out / f"{name}_{metric}.png").write_bytes(curves(steps, metric, across))
