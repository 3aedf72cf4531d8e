"""Train a classifier or a learned explainer: ``python train.py fit -c PRESET.yaml``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

import classifiers  # noqa: F401  short class names in configs
import datamodules  # noqa: F401
import explainers  # noqa: F401
from classifiers.memory import keep_freed_memory
from datamodules.base import ImageDataModule
from explainers.tracking import artifact_names, declare_inputs, wandb_mode


class LoggedConfig(SaveConfigCallback):
    """Keeps the resolved config beside the logs and, as plain data, in every logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config once, on the first process."""
        if self.already_saved or not trainer.is_global_zero:
            return
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


class Checkpoints(ModelCheckpoint):
    """The best epoch's checkpoint, and last.ckpt after every validation of a training.

    Lightning's own ``save_last`` writes last.ckpt only in epochs that are the best so far.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, then the last."""
        super().on_validation_end(trainer, pl_module)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.last_model_path = f"{self.dirpath}/last.ckpt"
            trainer.save_checkpoint(self.last_model_path)


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
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/loss",
                "checkpoint.enable_version_counter": False,
            }
        )

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

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Build the trainer with the logger asked for, unless the config brings its own."""
        config = self.config[self.subcommand]
        if config.trainer.logger is None:
            resumed = self.subcommand == "fit" and config.ckpt_path is not None
            folder = config.trainer.default_root_dir
            kwargs["logger"] = build_loggers(config.logging, folder, resumed)
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Tell W&B which classifier an explainer is trained for."""
        network = self.config.fit.model.get("init_args", {}).get("network")
        for logger in self.trainer.loggers if isinstance(network, str) else ():
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero:
                declare_inputs(logger.experiment, artifact_names([network]))


def build_loggers(kind: str, folder: str, resumed: bool = False) -> list[Logger]:
    """Loggers by name, all writing under ``folder``.

    The CSV file is ``folder/metrics.csv``; that of a resumed training lies in ``version_0``,
    ``version_1``, ... because the logger removes what stands in its way.
    """
    if kind == "off":
        return []
    if kind == "tensorboard":
        return [TensorBoardLogger(folder, name="", version="tensorboard")]
    loggers: list[Logger] = [CSVLogger(folder, name="", version=None if resumed else "")]
    if kind == "wandb":
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = "/".join(Path(folder).parts[-2:])
        mode = wandb_mode()  # the logger's own "offline" would refuse checkpoints as artifacts
        wandb_logger = WandbLogger(name, folder, project="simadv", log_model=True, mode=mode)
        loggers.append(wandb_logger)
    return loggers


def main(args: list[str] | None = None) -> TrainCLI:
    """Run the command line."""
    keep_freed_memory()
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
def plainly() -> Iterator[None]:
    """Bad input ends a command with its sentence; SIMADV_TRACEBACK=1 shows where it arose."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("SIMADV_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with plainly():
        main()
