"""Explainers that are trained: one or two generators per classifier."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from classifiers.network import Network, filled, network_from, read_checkpoint
from classifiers.optimisation import Optimisation
from explainers.learned.adversarial import Adversarial
from explainers.learned.base import LearnedExplainer
from explainers.learned.cycle import CyCE, CycleWeights, SyCE
from explainers.learned.distilled import Distilled
from explainers.learned.duo import Duo
from explainers.learned.generators import Geometry
from explainers.learned.mask import MaskGenerator, MaskWeights
from explainers.learned.similar_adversarial import Weights
from explainers.learned.single import Single
from explainers.views import Views

__all__ = [
    "Adversarial",
    "CyCE",
    "CycleWeights",
    "Distilled",
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
LEARNED: list[type[LearnedExplainer]] = [*WEIGHTS, Distilled]
COUNTED = ("widths", "discriminator", "convolutions")  # of which each makes layers
CLASSES: dict[object, type[LearnedExplainer]] = {cls.__name__: cls for cls in LEARNED}


def load_explainer(checkpoint: str | Path) -> LearnedExplainer:
    """Rebuild a learned explainer, its classifier included, in eval mode.

    Raises:
        ValueError: If the file cannot be read or holds no explainer.
    """
    content, source = read_checkpoint(checkpoint), str(checkpoint)
    described = content.get("explainer")
    named = described.get("class") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(named, str) or named not in CLASSES:
        raise ValueError(
            f"checkpoint {source!r} holds none of {sorted(map(str, CLASSES))}; give one "
            "that `train.py fit` wrote for a learned explainer."
        )
    network, state = network_from(content, source), content["state_dict"]
    return filled(partial(checked, described, network, len(state)), state, source).eval()


def checked(described: Mapping[str, Any], network: Network, weights: int) -> LearnedExplainer:
    """`rebuilt`, of a file's description, which may be a stranger's."""
    check_plain(described, weights)
    return rebuilt(described, network)


def check_plain(described: Mapping[str, Any], weights: int) -> None:
    """Raise ValueError where a description asks for more layers than weights, or for a download."""
    for name, value in described.items():
        if isinstance(value, Mapping):
            check_plain(value, weights)
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int) and count > weights and name in COUNTED:
            raise ValueError(f"{name} are {count}, more than the file's {weights} weights")
        if name == "unet" and ":" in value:
            raise ValueError(f"unet is {value!r}, which is not of this machine")


def rebuilt(described: Mapping[str, Any], network: Network) -> LearnedExplainer:
    """An explainer, untrained, from what `LearnedExplainer.description` told of it."""
    build = CLASSES[described["class"]]
    given = described["arguments"].items()
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    arguments["optimisation"] = Optimisation(**arguments["optimisation"])
    if build is Distilled:
        teacher, names = rebuilt(arguments.pop("teacher"), network), arguments.pop("witnesses", ())
        student = Distilled(teacher, **arguments | {"views": Views(**arguments["views"])})
        student.agreeing = list(names)
        return student
    arguments["weights"] = WEIGHTS[build](**arguments["weights"])
    geometry = arguments["geometry"] | {"encoder_weights": None}  # they are in the file already
    arguments["geometry"] = Geometry(**geometry | {"widths": tuple(geometry["widths"])})
    return build(network, **arguments)
