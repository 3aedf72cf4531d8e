"""Loggers that a training outlives: where they fail it goes on, and what they were told is kept."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only

from explainers.tracking import wandb_mode
from explainers.whole import write_whole

PATIENCE = {"init_timeout": 30.0, "finish_timeout": 600.0}  # seconds; WANDB_INIT_TIMEOUT overrides


class Continued(ExperimentWriter):
    """Adds to the rows of an earlier training, in place of those of steps that are taken again."""

    def _check_log_dir_exists(self) -> None:
        """The parent would remove the earlier rows."""

    def save(self) -> None:
        """Write the new rows, the first time after cutting what they replace."""
        file = Path(self.metrics_file_path)
        if self.metrics and not self.metrics_keys and file.exists():
            rows = csv.DictReader(io.StringIO(file.read_text(), newline=""))
            self.metrics_keys = list(rows.fieldnames or [])
            table = csv.DictWriter(text := io.StringIO(newline=""), self.metrics_keys)
            table.writeheader()
            table.writerows(row for row in rows if int(row["step"]) < self.metrics[0]["step"])
            write_whole(file, text.getvalue())
        super().save()


class SteadyCSV(CSVLogger):
    """Keeps the rows that cannot be written, and writes them when it can be done again.

    Args:
        folder: Where metrics.csv lies.
        resumed: Whether the rows that it holds are kept; without, they are removed.
    """

    told = False

    def __init__(self, folder: str | Path, resumed: bool = False) -> None:
        super().__init__(folder, name="", version="")
        self.resumed = resumed

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the rows."""
        if self._experiment is None and self.resumed:
            self._experiment = Continued(self.log_dir)
        experiment: ExperimentWriter = super().experiment
        return experiment

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that were not yet written, all or none."""
        file, keys = Path(self.experiment.metrics_file_path), list(self.experiment.metrics_keys)
        before = file.read_bytes() if file.exists() else None
        try:
            super().save()
        except OSError as error:
            if before is not None and file.stat().st_size != len(before):
                file.write_bytes(before)  # a part of a row, or a header alone
            self.experiment.metrics_keys = keys
            if not self.told:
                warnings.warn(
                    f"{str(file)!r} cannot be written ({error}): its rows are kept in memory, and "
                    "written when that works again.",
                    stacklevel=2,
                )
            self.told = True


class SteadyWandb(WandbLogger):
    """Goes on offline, with one warning, where W&B is not reached in time or fails.

    Args:
        name: Of the run.
        folder: Of what W&B writes.
    """

    failed = False

    def __init__(self, name: str, folder: str) -> None:
        from wandb import Settings  # slow to import

        limits: dict[str, Any] = {
            k: v for k, v in PATIENCE.items() if f"WANDB_{k.upper()}" not in os.environ
        }
        # the logger's own "offline" would refuse checkpoints as artifacts
        super().__init__(
            name,
            folder,
            project="simadv",
            log_model=True,
            mode=wandb_mode(),
            settings=Settings(**limits),
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, offline where it cannot be had online."""
        from wandb.errors import Error

        try:
            return super().experiment
        except Error as error:
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"W&B cannot be used online ({reason}): the run is kept offline, `wandb sync` "
                "sends it later.",
                stacklevel=2,
            )
            self._wandb_init["mode"] = "offline"
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log, as long as W&B takes it."""
        from wandb.errors import Error

        try:
            if not self.failed:
                super().log_metrics(metrics, step)
        except (Error, OSError) as error:
            self.failed = True
            warnings.warn(
                f"W&B takes no more of this run ({error}): training goes on, and metrics.csv has "
                "everything.",
                stacklevel=2,
            )
