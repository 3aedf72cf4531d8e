"""Scores of any explainers on one data set under one protocol, per image."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor
from torch import distributed as dist

from classifiers.network import Network, decide, probabilities
from explainers.base import Explainer
from explainers.batches import peak_memory
from explainers.evaluation.counterfactual import Real, counterpart_scores
from explainers.evaluation.metrics.generated import flipped, image_similarity, kept
from explainers.evaluation.metrics.localisation import (
    PERCENTILES,
    curve_at,
    localisation_scores,
    operating_points,
    rank,
    ranked_average_precision,
)
from explainers.views import Views, smooth

Batch = Mapping[str, Any]
Generator = Callable[[Tensor], tuple[Tensor, Tensor]]
Explained = Callable[[Tensor, "Cost"], Tensor]  # maps of images, what they took added to the cost
Rows = list[dict[str, object]]
T = TypeVar("T")
TENSORS = ("image", "mask", "label", "features", "importance")  # of a batch
PAIRS = ("x_xs", "x_xa", "xs_xa")
FORMS = ("raw", "smoothed")  # of maps


@dataclass(frozen=True)
class Entry:
    """A row of the table: an explainer by name, and whether it is a control."""

    name: str
    explainer: Explainer
    control: bool = False


@dataclass(frozen=True)
class Limit:
    """How many annotated images a slow method is scored on, drawn by a hash of their ids.

    Attributes:
        plain: Of the plain maps; all by default.
        views: Of the maps averaged over views; all by default.
        validation: Most of the validation split, on which the smoothing is chosen; by default as
            many as are scored.
    """

    plain: int | None = None
    views: int | None = None
    validation: int | None = None


@dataclass(frozen=True)
class Protocol:
    """What all rows of a table have in common.

    Attributes:
        split: Scored split; smoothing is chosen on "val".
        views: Of the maps; None, or a count of 0, scores plain maps alone.
        smoothing: Sigmas to choose from, shares of the image side.
        limits: Of slow methods, by the name of their row.
    """

    split: Literal["val", "test"] = "test"
    views: Views | None = None
    smoothing: Sequence[float] = (0.0,)
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def variants(self) -> list[Views | None]:
        """Plain maps, then those averaged over views if there are any."""
        return [None, self.views] if self.views and self.views.count else [None]

    def limit(self, name: str, views: Views | None) -> int | None:
        """Images that a method is scored on; None is all."""
        limit = self.limits.get(name, Limit())
        return limit.views if views else limit.plain

    def choosing(self, name: str, views: Views | None) -> int | None:
        """Validation images that a method's smoothing is chosen on; None is all."""
        counts = self.limit(name, views), self.limits.get(name, Limit()).validation
        return min((count for count in counts if count is not None), default=None)


@dataclass
class Cost:
    """What explaining took, smoothing and scoring left out.

    Attributes:
        images: Number of explained images.
        seconds: Wall time of all of them.
        megabytes: Largest memory beyond that in use before; NaN where it cannot be read.
        largest: Images of the largest batch so far; memory is measured where one is larger.
    """

    images: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    largest: int = 0

    def add(self, seconds: float, megabytes: float) -> None:
        """One image more, explained before."""
        self.images += 1
        self.seconds += seconds
        self.megabytes = float(np.maximum(self.megabytes, megabytes))  # NaN stays NaN

    def per_image(self) -> dict[str, float]:
        """Seconds per image and peak megabytes, over all processes: their sum and their largest."""
        costs = gathered([(self.images, self.seconds, self.megabytes)])
        images = sum(cost[0] for cost in costs)
        seconds = sum(cost[1] for cost in costs) / images if images else float("nan")
        return {"seconds": seconds, "megabytes": max(cost[2] for cost in costs)}


def annotated(
    batches: Iterable[Batch], device: torch.device, only: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The images that have a mask, with all tensors, on the device; ``only`` some if given."""
    for batch in batches:
        wanted = torch.tensor([only is None or name in only for name in batch["id"]])
        chosen = (batch["has_mask"] & wanted).nonzero().flatten()
        if len(chosen):
            yield {
                "id": [batch["id"][k] for k in chosen.tolist()],
                **{key: batch[key][chosen].to(device) for key in TENSORS},
            }


def drawn(batches: Iterable[Batch], count: int | None) -> list[str] | None:
    """Ids of ``count`` annotated images, the same whatever their order; None without a count."""
    if count is None:
        return None
    ids = [k for b in batches for k, there in zip(b["id"], b["has_mask"], strict=True) if there]
    return sorted(gathered(ids), key=lambda name: sha256(name.encode()).hexdigest())[:count]


class Choice(NamedTuple):
    """What the validation images decide for one method.

    Attributes:
        sigma: Of the smoothing, share of the image side.
        percentiles: Threshold with the highest mean IoU, of the "raw" maps and the "smoothed" ones;
            none where nothing was tried.
    """

    sigma: float
    percentiles: Mapping[str, float]


def choose(
    explained: Explained, batches: Iterable[dict[str, Any]], candidates: Sequence[float]
) -> Choice:
    """Sigma with the highest mean average precision, and the percentiles; the smaller of equals.

    Args:
        explained: The maps that are smoothed.
        batches: Annotated validation images, never those of the test split.
        candidates: Sigmas to choose from, shares of the image side; one needs no validation.

    Raises:
        ValueError: If there is none, or more than one and no annotated image.
    """
    if not candidates:
        raise ValueError("smoothing needs at least one sigma (0 is off), but got [].")
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    total = torch.zeros(len(candidates), 1 + len(PERCENTILES), dtype=torch.float64)
    cost = Cost()
    for batch in batches:
        raw = explained(batch["image"], cost)
        for k, sigma in enumerate(candidates):
            ranked = rank(smooth(raw, sigma), batch["mask"])
            ious = curve_at(ranked, PERCENTILES).iou
            scores = torch.cat([ranked_average_precision(ranked)[:, None], ious], 1)
            total[k] += scores.nansum(0).cpu()
    total = torch.stack(gathered([total])).sum(0)
    if not total[:, 0].any():
        raise ValueError(
            f"smoothing is chosen from {list(candidates)} on the validation split, but none of its "
            "images has a mask; give a single sigma, --smoothing [0]."
        )
    sigma = candidates[first_best(total[:, 0])]
    best = {one: first_best(row[1:]) for one, row in zip(candidates, total, strict=True)}
    forms = {"raw": 0.0, "smoothed": sigma}
    return Choice(sigma, {k: PERCENTILES[best[one]] for k, one in forms.items() if one in best})


def first_best(values: Float64[Tensor, " n"]) -> int:
    """Place of the highest value, the first of equals."""
    return int((values - values.max()).abs().le(1e-9).nonzero()[0])


@contextmanager
def named(row: str) -> Iterator[None]:
    """A ValueError inside says in which row it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {row!r}: {error}") from error


def score_entry(
    entry: Entry,
    form: Literal["plain", "views"],
    explained: Explained,
    validation: Iterable[dict[str, Any]],
    scored: Iterable[dict[str, Any]],
    candidates: Sequence[float],
) -> tuple[Rows, dict[str, object]]:
    """Scores per image of one entry, and its chosen smoothing and costs.

    Args:
        entry: The explainer.
        form: Of the maps.
        explained: The maps.
        validation: Annotated images on which the smoothing is chosen.
        scored: Annotated images that are scored.
        candidates: Sigmas to choose from; see `choose`.
    """
    row = {"method": entry.name, "views": form}
    with named(entry.name):
        sigma, percentiles = choose(explained, validation, candidates)
        sigmas = {"raw": 0.0} | ({"smoothed": sigma} if any(candidates) else {})
        rows, cost = score_maps(row, explained, scored, sigmas, percentiles)
    chosen = {f"percentile_{name}": percentiles.get(name, float("nan")) for name in FORMS}
    told = {**row, "control": entry.control, "sigma": sigma}
    return rows, {**told, **chosen, **cost.per_image()}


def score_maps(
    row: Mapping[str, object],
    explained: Explained,
    batches: Iterable[dict[str, Any]],
    sigmas: Mapping[str, float],
    percentiles: Mapping[str, float],
) -> tuple[Rows, Cost]:
    """Localisation scores of every image, for each named sigma, and what the maps cost.

    Args:
        row: What every line has in common.
        explained: The maps.
        batches: Annotated images.
        sigmas: Smoothing by the name it has in the table, one of `FORMS`.
        percentiles: At which the IoU is "iou_chosen", by that name.
    """
    rows: Rows = []
    cost = Cost()
    for batch in batches:
        raw = explained(batch["image"], cost)
        for name, sigma in sigmas.items():
            maps = smooth(raw, sigma)
            scores = localisation_scores(maps, batch["mask"])
            if name in percentiles:
                scores["iou_chosen"] = scores[f"iou_{percentiles[name]:g}"]
            scores |= operating_points(maps, batch["mask"])
            rows += long_form(batch["id"], scores, {**row, "smoothing": name})
    return gathered(rows), cost


def long_form(ids: Sequence[str], scores: Mapping[str, Tensor], row: Mapping[str, object]) -> Rows:
    """One line per image and metric."""
    return [
        {"id": name, **row, "metric": metric, "value": value}
        for metric, values in scores.items()
        for name, value in zip(ids, values.tolist(), strict=True)
    ]


def classified(
    network: Network, batches: Iterable[Batch], groups: Mapping[str, str], device: torch.device
) -> pd.DataFrame:
    """One line per image: id, group, label, decision, correct, p(class) of each, table columns.

    A column of the user's table that has one of these names gets "table_" before it.
    """
    rows: Rows = []
    columns = [f"p({name})" for name in network.class_names]
    for batch in batches:
        with torch.inference_mode():
            logits = network(batch["image"].to(device)).cpu()
        decision, probability = decide(logits, network.threshold), probabilities(logits)
        for k, name in enumerate(batch["id"]):
            label = int(batch["label"][k])
            row = {
                "id": name,
                "group": groups[name],
                "label": network.class_names[label],
                "decision": network.class_names[int(decision[k])],
                "correct": int(decision[k]) == label,
                **dict(zip(columns, probability[k].tolist(), strict=True)),
            }
            table = {column: values[k] for column, values in batch["columns"].items()}
            taken = {*row, "seed"}
            rows.append(row | {f"table_{c}" if c in taken else c: table[c] for c in table})
    every: Any = gathered(rows)  # pandas' stubs take no list of dict[str, object]
    return pd.DataFrame(every).sort_values("id", ignore_index=True)


def score_generated(
    name: str,
    generate: Generator,
    network: Network,
    batches: Iterable[Batch],
    device: torch.device,
    real: Real,
) -> Rows:
    """Kept, flipped, p(class), SSIM and PSNR of every image of a similar-adversarial explainer.

    "kept" and "flipped" are 0 or 1 per image; with the decided class behind an underscore they
    cover the images of that class alone. "p_similar(class)" and "p_adversarial(class)" are what
    the classifier says of the generated images. Infinite PSNR (identical images) is left out.

    Args:
        name: Of the row.
        generate: Gives x_s and x_a, in [0, 1].
        network: Whose decisions count.
        batches: Of a split.
        device: Of the generator and the network.
        real: Image by its id, for `counterpart_scores`.
    """
    rows: Rows = []
    for batch in batches:
        image = batch["image"].to(device)
        with torch.inference_mode():
            similar, adversarial = generate(image)
            logits = [network(x) for x in (image, similar, adversarial)]
            decided, *others = (decide(z, network.threshold) for z in logits)
            pairs = ((image, similar), (image, adversarial), (similar, adversarial))
            similarity = [image_similarity(*pair) for pair in pairs]
        scores = {
            "kept": kept(decided, others[0]).double(),
            "flipped": flipped(decided, others[1]).double(),
        }
        of_similar, of_adversarial = map(probabilities, logits[1:])
        for k, class_name in enumerate(network.class_names):
            for metric in ("kept", "flipped"):
                scores[f"{metric}_{class_name}"] = scores[metric].where(decided == k, torch.nan)
            scores[f"p_similar({class_name})"] = of_similar[:, k]
            scores[f"p_adversarial({class_name})"] = of_adversarial[:, k]
        for pair, (ssim, psnr) in zip(PAIRS, similarity, strict=True):
            scores |= {f"ssim_{pair}": ssim, f"psnr_{pair}": psnr.where(psnr.isfinite(), torch.nan)}
        images = {"x": image, "xs": similar, "xa": adversarial}
        counterparts = counterpart_scores(batch, images, real)
        row = {"method": name, "views": "plain", "smoothing": "raw"}
        rows += long_form(batch["id"], scores, row) + long_form(*counterparts, row)
    return [row for row in gathered(rows) if row["value"] == row["value"]]


def digest(batches: Iterable[Batch]) -> list[str]:
    """What stands for the ids, pixels and masks of a split: a hash for each process."""
    content = sha256()
    for batch in batches:
        content.update(repr(batch["id"]).encode())
        for part in ("image", "mask"):
            content.update(batch[part].contiguous().numpy().tobytes())
    return gathered([content.hexdigest()])


def gathered(rows: list[T]) -> list[T]:
    """Rows of all processes, in the order of the processes; the list itself without several."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


@contextmanager
def measured(cost: Cost, image: Tensor) -> Iterator[None]:
    """Add the time and the peak memory of what happens inside."""
    on_gpu = image.device.type == "cuda"
    larger = len(image) > cost.largest
    if larger:
        if not on_gpu and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # memory that is kept and taken again would not count
        before = peak_memory(image.device, reset=True)
    start = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize(image.device)
    cost.seconds += time.perf_counter() - start
    cost.images += len(image)
    if larger:
        cost.largest = len(image)
        megabytes = (peak_memory(image.device) - before) / 2**20
        cost.megabytes = float(np.maximum(cost.megabytes, megabytes))  # NaN stays NaN
