"""The model card of an export: what it was made of, what it reads and says, what it is not for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any, Literal, NamedTuple

from explainers.whole import write_whole

USE = (
    "Shows which parts of an image move this classifier's decision: to check a classifier, to find "
    "its short cuts, and for research. Not a medical device, not for diagnosis."
)
LIMITS = (
    "A map shows what moves this classifier, not what is ill.",
    "Images of other devices, views or populations than the training data's may be misread.",
    "Where the adversarial image is decided as before, the map explains little: compare decisions.",
    "Aspect is not kept: every image is resized to the square that the model was trained on.",
)
LICENCE = (
    "The code is Apache-2.0. The weights follow the licences of the training data and of the "
    "pretrained weights that they started from: {weights}."
)


class Told(NamedTuple):
    """What a card tells of a model that is to be used."""

    channels: Literal[1, 3]
    size: int
    class_names: Sequence[str]


def read_card(model: Path) -> Told:
    """What the card beside an exported model tells of it.

    Raises:
        ValueError: If there is none, it is damaged, or it belongs to another file.
    """
    path = model.with_name("card.json")
    if not path.is_file():
        raise ValueError(f"{path} is missing: keep it beside the model that it belongs to.")
    try:
        content = json.loads(path.read_text("utf-8"))
        _, channels, size, _ = content["input"]["shape"]
        names, digest = content["classifier"]["class_names"], content["sha256"][model.name]
        plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not plain or len(set(names)) < max(len(names), 2) or channels not in (1, 3):
            raise ValueError
        if type(size) is not int or size < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or of another version: export {model} anew."
        ) from error
    if hashlib.sha256(model.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{model} is not the file that {path} tells of: export both anew.")
    return Told(channels, size, names)


def card(
    checkpoint: Path,
    recipe: Mapping[str, Any],
    explainer: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is told, as plain values.

    Args:
        checkpoint: That was exported.
        recipe: Of the classifier.
        explainer: Class and arguments of the generator.
        facts: Data, input, views, parity, localisation, seconds.
    """
    return {
        "name": checkpoint.parent.name,
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "simadv": {"version": own_version(), "commit": commit()},
        "classifier": dict(recipe),
        "explainer": dict(explainer),
        **facts,
        "licence": LICENCE.format(weights=recipe["weights"] or "none"),
        "intended_use": USE,
        "limits": list(LIMITS),
    }


def write_card(content: Mapping[str, Any], folder: Path) -> None:
    """Write card.md and card.json."""
    lines = [f"# {content['name']}", ""]
    for name, value in content.items():
        if isinstance(value, list):
            lines += [f"## {name.replace('_', ' ')}", "", *(f"- {line}" for line in value), ""]
        elif isinstance(value, dict):
            rows = [f"| {key} | {json.dumps(each)} |" for key, each in value.items()]
            head = ["| | |", "| --- | --- |"]
            lines += [f"## {name.replace('_', ' ')}", "", *head, *rows, ""]
        elif name != "name":
            lines += [f"**{name.replace('_', ' ')}**: {value}", ""]
    write_whole(folder / "card.md", "\n".join(lines))
    write_whole(folder / "card.json", json.dumps(content, indent=2))


def own_version() -> str:
    """Of the installed package."""
    try:
        return version("simadv")
    except PackageNotFoundError:
        return "unknown"


def commit() -> str:
    """Of the checkout that this file lies in, "unknown" without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return check_output(command, text=True, stderr=DEVNULL).strip()
    except (OSError, CalledProcessError):
        return "unknown"
