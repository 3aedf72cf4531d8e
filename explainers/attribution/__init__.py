"""Attribution: gradients, class activation maps, and the controls that they must beat."""

from explainers.attribution.cam import GradCAM
from explainers.attribution.controls import (
    CentredGaussian,
    EdgeMap,
    MeanMask,
    RandomMap,
    mean_mask,
)
from explainers.attribution.gradient import Gradient, IntegratedGradients, SmoothGrad

__all__ = [
    "CentredGaussian",
    "EdgeMap",
    "GradCAM",
    "Gradient",
    "IntegratedGradients",
    "MeanMask",
    "RandomMap",
    "SmoothGrad",
    "mean_mask",
]
