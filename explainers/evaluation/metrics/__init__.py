"""Metrics: tensors in, numbers out. A function for the mathematics, a thin class for the mean."""

from explainers.evaluation.metrics.boxes import (
    MaxBoxAccuracy,
    PixelAveragePrecision,
    best_box_ious,
)
from explainers.evaluation.metrics.consistency import (
    map_ssim,
    spearman,
)
from explainers.evaluation.metrics.faithfulness import (
    confidence_drop,
    confidence_increased,
    filled,
    insertion_deletion,
    masked,
    road,
)
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
from explainers.evaluation.metrics.mean import (
    ImageMean,
)
from explainers.evaluation.metrics.overlap import (
    area_matched,
    binary_coverage,
    otsu_thresholds,
    overlap,
    pixel_auprc,
    relevance_mass,
    relevance_rank,
    soft_coverage,
    threshold_sweep,
)
from explainers.evaluation.metrics.pointing import (
    graded_hit,
    hit_rate,
    pointing_game,
)
from explainers.evaluation.metrics.scaling import (
    min_max,
    region_min_max,
    set_range,
    set_wide,
    superpixels,
    tiles,
)

__all__ = [
    "Decisions",
    "ImageMean",
    "ImageSimilarity",
    "Localisation",
    "MaxBoxAccuracy",
    "PixelAveragePrecision",
    "area_matched",
    "average_precision",
    "best_box_ious",
    "binary_coverage",
    "confidence_drop",
    "confidence_increased",
    "filled",
    "flipped",
    "graded_hit",
    "hit_rate",
    "image_similarity",
    "insertion_deletion",
    "kept",
    "localisation_scores",
    "map_ssim",
    "masked",
    "min_max",
    "operating_points",
    "otsu_thresholds",
    "overlap",
    "partial_auc",
    "percentile_curve",
    "percentile_iou",
    "pixel_auprc",
    "pointing_game",
    "region_min_max",
    "relevance_mass",
    "relevance_rank",
    "road",
    "set_range",
    "set_wide",
    "soft_coverage",
    "spearman",
    "superpixels",
    "threshold_sweep",
    "tiles",
    "total_auc",
]
