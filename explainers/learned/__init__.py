"""Explainers that are trained: one or two generators per classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from classifiers.network import network_from, read_checkpoint
from classifiers.optimisation import Optimisation
from explainers.learned.adversarial import Adversarial
from explainers.learned.base import LearnedExplainer, Weights
from explainers.learned.duo import Duo
from explainers.learned.generators import Geometry
from explainers.learned.single import Single

__all__ = [
    "Adversarial",
    "Duo",
    "Geometry",
    "LearnedExplainer",
    "Single",
    "Weights",
    "load_explainer",
]


def load_explainer(checkpoint: str | Path) -> LearnedExplainer:
    """Rebuild a learned explainer, its classifier included, in eval mode.

    Raises:
        ValueError: If the file cannot be read or holds no explainer.
    """
    content = read_checkpoint(checkpoint)
    described = content.get("explainer")
    classes = {cls.__name__: cls for cls in (Single, Duo, Adversarial)}
    if not isinstance(described, Mapping) or described.get("class") not in classes:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} holds none of {sorted(classes)}; give a checkpoint "
            "of `train.py fit` with a learned explainer."
        )
    arguments = dict(described["arguments"])
    arguments["weights"] = Weights(**arguments["weights"])
    geometry = arguments["geometry"] | {"encoder_weights": None}  # they are in the file already
    arguments["geometry"] = Geometry(**geometry | {"widths": tuple(geometry["widths"])})
    arguments["optimisation"] = Optimisation(**arguments["optimisation"])
    explainer = classes[described["class"]](network_from(content, str(checkpoint)), **arguments)
    explainer.load_state_dict(content["state_dict"])
    return explainer.eval()
