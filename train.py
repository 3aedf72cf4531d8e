"""Train a classifier or a learned explainer: ``python train.py fit -c PRESET.yaml``."""

from __future__ import annotations

import fcntl
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import classifiers.classifier  # noqa: F401  short class names in configs
import datamodules  # noqa: F401
import explainers.learned  # noqa: F401
from classifiers.checkpoints import Checkpoints, WholeFiles
from classifiers.companions import Companions
from classifiers.memory import keep_freed_memory
from classifiers.network import read_checkpoint
from classifiers.nonfinite import NonFinite
from datamodules.base import ImageDataModule
from explainers.batches import out_of_memory, peak_memory
from explainers.command import plainly
from explainers.learned.base import LearnedExplainer
from explainers.loggers import SteadyCSV, SteadyWandb
from explainers.tracking import artifact_names, declare_inputs


class LoggedConfig(SaveConfigCallback):
    """Keeps the resolved config beside the logs and, as plain data, in every logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config once, on the first process, with what the module's class decided."""
        if self.already_saved or not trainer.is_global_zero:
            return
        given = self.config.model.get("init_args", {})
        if "optimisation" in given and isinstance(pl_module, LearnedExplainer):
            given["optimisation"] = asdict(pl_module.optimisation)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, folder / "config.yaml", skip_unset=False, overwrite=True, multifile=False
        )
        plain = self.config.clone().as_dict()
        plain.pop("config", None)
        for logger in trainer.loggers:
            logger.log_hyperparams(plain)
        self.already_saved = True


class TrainCLI(LightningCLI):
    """LightningCLI with a run folder, a best and a last checkpoint, and a logger by name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our options beside Lightning's."""
        parser.add_argument(
            "--out",
            type=str,
            default="runs/train",
            help="Folder of checkpoints, config and logs, also where checkpoint.dirpath or "
            "trainer.default_root_dir name another; other commands than fit log to a folder of "
            "their name in it.",
        )
        parser.add_argument(
            "--devices", type=int | None, help="GPUs or processes: short for --trainer.devices."
        )
        parser.add_argument(
            "--logging",
            type=str,
            choices=["wandb", "csv", "tensorboard", "off"],
            default="wandb",
            help="wandb (offline without a key; metrics.csv too), csv, tensorboard or off.",
        )
        parser.add_argument(
            "--last_every_n_steps",
            type=int,
            default=0,
            help="Write last.ckpt after so many steps of an epoch too; 0: after validations alone.",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=str,
            choices=["stop", "skip"],
            default="stop",
            help="stop training at a loss or gradient that is not finite, or skip its step.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/loss",
                "checkpoint.enable_version_counter": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning looks for hyperparameters in a checkpoint: a damaged one is told before."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and Path(path).is_file():
            read_checkpoint(path)
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Put everything that a run writes into its folder, and keep what a fit wrote there."""
        config = self.config[self.subcommand]
        if config.trainer.enable_progress_bar is False:  # Lightning refuses a bar then
            self.trainer_defaults.pop("callbacks")
        if config.devices is not None:
            config.trainer.devices = config.devices
        config.checkpoint.dirpath = config.out
        fit = self.subcommand == "fit"
        config.trainer.default_root_dir = config.out if fit else f"{config.out}/{self.subcommand}"
        if fit and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.held = lock(Path(config.out))  # open until this process ends

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Build the trainer with the logger asked for, unless the config brings its own."""
        config = self.config[self.subcommand]
        if config.trainer.logger is None:
            resumed = self.subcommand == "fit" and config.ckpt_path is not None
            folder = config.trainer.default_root_dir
            kwargs["logger"] = build_loggers(config.logging, folder, resumed)
        if config.trainer.plugins is None:
            kwargs["plugins"] = [WholeFiles()]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, Companions())  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            trainer.callbacks.insert(0, NonFinite(config.on_nonfinite))  # type: ignore[attr-defined]
            trainer.checkpoint_callback.steps = config.last_every_n_steps  # type: ignore[union-attr]
        return trainer

    def after_fit(self) -> None:
        """Tell how much memory training took."""
        device = self.trainer.strategy.root_device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the process"
        peak = peak_memory(device) / 2**20
        print(f"Peak memory of {place}, rank {self.trainer.global_rank}: {peak:.0f} MB")

    def before_fit(self) -> None:
        """Tell W&B which classifier, or which teacher, an explainer is trained for."""
        given = self.config.fit.model.get("init_args", {})
        source = given.get("teacher", given.get("network"))
        for logger in self.trainer.loggers if isinstance(source, str) else ():
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero:
                declare_inputs(logger.experiment, artifact_names([source]))


def lock(folder: Path) -> IO[str] | None:
    """Keep other processes from training in a folder until this one ends.

    Returns:
        The locked file: who closes it opens the folder to others. None where the folder cannot be
        written, which whoever writes there tells, or, with a warning, where there are no locks.

    Raises:
        ValueError: If another process trains there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would outlive us in our workers
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"another training writes to {str(folder)!r}; wait for its end or give another --out."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): train there once at a time.", stacklevel=2
        )
        return None
    return file


def build_loggers(kind: str, folder: str, resumed: bool = False) -> list[Logger]:
    """Loggers by name, all writing under ``folder``; metrics.csv goes on where it is resumed."""
    if kind == "off":
        return []
    if kind == "tensorboard":
        return [TensorBoardLogger(folder, name="", version="tensorboard")]
    loggers: list[Logger] = [SteadyCSV(folder, resumed)]
    if kind == "wandb":
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = "/".join(Path(folder).parts[-2:])
        loggers.append(SteadyWandb(name, folder))
    return loggers


def main(args: list[str] | None = None) -> TrainCLI:
    """Run the command line."""
    keep_freed_memory()
    with advising():
        return TrainCLI(
            LightningModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=LoggedConfig,
            trainer_defaults={"callbacks": [RichProgressBar()]},
            args=args,
        )


@contextmanager
def advising() -> Iterator[None]:
    """Where memory runs out, a ValueError tells what to set; a stop by SIGTERM is no success.

    Lightning ends with status 0 then, and what a shell starts next would take half a training for a
    whole one.
    """
    try:
        yield
    except SIGTERMException:
        print("stopped by SIGTERM; --ckpt_path last goes on where it stands.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            "memory ran out: lower data.loading.batch_size and raise "
            "trainer.accumulate_grad_batches by as much, or, on a GPU, set trainer.precision to "
            "bf16-mixed; then go on with --ckpt_path last."
        ) from error


if __name__ == "__main__":
    with plainly():
        main()
