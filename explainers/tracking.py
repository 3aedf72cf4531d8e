"""Weights & Biases: whether it is reached, and what a run started from and left."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


def wandb_mode() -> Literal["offline"] | None:
    """W&B's own choice (None) where WANDB_MODE or a key is there, else "offline"."""
    import wandb  # slow to import

    known = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    return None if known else "offline"


def artifact_name(checkpoint: Path) -> str | None:
    """Artifact that the training run of a checkpoint logged; None where W&B did not follow it.

    Lightning gives the best weights the alias "best" and the last logged ones "latest".
    """
    runs = [
        (found[1], found[2])
        for path in (checkpoint.parent / "wandb").glob("*run-*-*")
        if (found := re.fullmatch(r"(?:offline-)?run-(\d+_\d+)-(\w+)", path.name))
    ]
    alias = "best" if checkpoint.stem == "best" else "latest"
    return f"model-{max(runs)[1]}:{alias}" if runs else None


def artifact_names(checkpoints: Iterable[str | Path]) -> list[str]:
    """Artifacts of checkpoints, to be asked before a run of one's own begins in their folder."""
    names = (artifact_name(Path(path)) for path in checkpoints)
    return [name for name in names if name]


def declare_inputs(run: Any, artifacts: Iterable[str]) -> None:
    """Tell a run which artifacts it starts from: W&B's lineage. Offline runs cannot know."""
    if run.offline:
        return
    from wandb.errors import CommError

    for name in artifacts:
        try:
            run.use_artifact(name)
        except (CommError, ValueError) as error:
            told = f"W&B does not know {name}, so that its lineage is cut: {error}"
            warnings.warn(told, stacklevel=2)


def log_files(run: Any, name: str, kind: str, paths: Iterable[Path]) -> None:
    """Log files as one artifact of a run."""
    from wandb import Artifact

    artifact = Artifact(re.sub(r"[^\w.-]", "-", name), kind)
    for path in paths:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
