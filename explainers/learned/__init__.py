"""Explainers that are trained: one or two generators per classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classifiers.network import network_from, read_checkpoint
from classifiers.optimisation import Optimisation
from explainers.learned.adversarial import Adversarial
from explainers.learned.base import LearnedExplainer
from explainers.learned.cycle import CyCE, CycleWeights, SyCE
from explainers.learned.duo import Duo
from explainers.learned.generators import Geometry
from explainers.learned.mask import MaskGenerator, MaskWeights
from explainers.learned.similar_adversarial import Weights
from explainers.learned.single import Single

__all__ = [
    "Adversarial",
    "CyCE",
    "CycleWeights",
    "Duo",
    "Geometry",
    "LearnedExplainer",
    "MaskGenerator",
    "MaskWeights",
    "Single",
    "SyCE",
    "Weights",
    "load_explainer",
]

WEIGHTS: dict[type[LearnedExplainer], type] = {
    Single: Weights,
    Duo: Weights,
    Adversarial: Weights,
    MaskGenerator: MaskWeights,
    SyCE: CycleWeights,
    CyCE: CycleWeights,
}


def load_explainer(checkpoint: str | Path) -> LearnedExplainer:
    """Rebuild a learned explainer, its classifier included, in eval mode.

    Raises:
        ValueError: If the file cannot be read or holds no explainer.
    """
    content = read_checkpoint(checkpoint)
    described = content.get("explainer")
    classes: dict[object, type[LearnedExplainer]] = {cls.__name__: cls for cls in WEIGHTS}
    if not isinstance(described, Mapping) or described.get("class") not in classes:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} holds none of {sorted(map(str, classes))}; give one "
            "that `train.py fit` wrote for a learned explainer."
        )
    build = classes[described["class"]]
    given = described["arguments"].items()
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    arguments["weights"] = WEIGHTS[build](**arguments["weights"])
    geometry = arguments["geometry"] | {"encoder_weights": None}  # they are in the file already
    arguments["geometry"] = Geometry(**geometry | {"widths": tuple(geometry["widths"])})
    arguments["optimisation"] = Optimisation(**arguments["optimisation"])
    explainer = build(network_from(content, str(checkpoint)), **arguments)
    explainer.load_state_dict(content["state_dict"])
    return explainer.eval()
