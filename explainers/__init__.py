"""Visual explanations of image classifiers: learned, attributed, evaluated."""

from explainers.base import Explainer, quantus_function
from explainers.learned import (
    Adversarial,
    CyCE,
    Duo,
    Geometry,
    MaskGenerator,
    Single,
    SyCE,
    Weights,
    load_explainer,
)
from explainers.views import Views

__all__ = [
    "Adversarial",
    "CyCE",
    "Duo",
    "Explainer",
    "Geometry",
    "MaskGenerator",
    "Single",
    "SyCE",
    "Views",
    "Weights",
    "load_explainer",
    "quantus_function",
]
