from .base import Explainer, quantus_function
from .learned import (
    Adversarial,
    CyCE,
    Distilled,
    Duo,
    Geometry,
    MaskGenerator,
    Single,
    SyCE,
    Weights,
    load_explainer,
)
from .views import Views

__all__ = [
    "Adversarial",
    "CyCE",
    "Distilled",
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
