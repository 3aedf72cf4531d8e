"""Attribution without training: gradients, activations, perturbations, and the controls."""

from explainers.attribution.ablation import AblationCAM, ScoreCAM
from explainers.attribution.cam import (
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from explainers.attribution.controls import (
    CentredGaussian,
    EdgeMap,
    MeanMask,
    RandomMap,
    mean_mask,
)
from explainers.attribution.fullgrad import FullGrad
from explainers.attribution.gradient import (
    Gradient,
    GradientSHAP,
    InputXGradient,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradIG,
)
from explainers.attribution.masks import BBMP, ExtremalPerturbation
from explainers.attribution.perceptual import PerceptualPerturbation
from explainers.attribution.perturbation import RISE, Occlusion
from explainers.attribution.regions import XRAI
from explainers.attribution.rules import DeepLIFT, GuidedBackpropagation

__all__ = [
    "BBMP",
    "RISE",
    "XRAI",
    "AblationCAM",
    "CentredGaussian",
    "DeepLIFT",
    "EdgeMap",
    "EigenCAM",
    "ExtremalPerturbation",
    "FullGrad",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientSHAP",
    "GuidedBackpropagation",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "LayerCAM",
    "MeanMask",
    "Occlusion",
    "PerceptualPerturbation",
    "RandomMap",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradIG",
    "XGradCAM",
    "mean_mask",
]
