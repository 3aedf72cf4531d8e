"""Metrics: tensors in, numbers out. A function for the mathematics, a thin class for the mean."""

from explainers.evaluation.metrics.generated import (
    Decisions,
    ImageSimilarity,
    flipped,
    image_similarity,
    kept,
)
from explainers.evaluation.metrics.localisation import (
    Localisation,
    average_precision,
    localisation_scores,
    operating_points,
    partial_auc,
    percentile_curve,
    percentile_iou,
    total_auc,
)

__all__ = [
    "Decisions",
    "ImageSimilarity",
    "Localisation",
    "average_precision",
    "flipped",
    "image_similarity",
    "kept",
    "localisation_scores",
    "operating_points",
    "partial_auc",
    "percentile_curve",
    "percentile_iou",
    "total_auc",
]
