"""Visual explanations of image classifiers: learned, attributed, evaluated."""

from explainers.base import Explainer
from explainers.learned import Adversarial, Duo, Geometry, Single, Weights, load_explainer
from explainers.views import Views

__all__ = [
    "Adversarial",
    "Duo",
    "Explainer",
    "Geometry",
    "Single",
    "Views",
    "Weights",
    "load_explainer",
]
