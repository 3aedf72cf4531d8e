"""Training of the classifier that is to be explained."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional
from torchmetrics import CatMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import binary_roc

from classifiers.network import Network, check_classes, decide, probabilities
from classifiers.optimisation import Optimisation, check_plan


class Classifier(LightningModule):
    """Trains a `Network` by cross-entropy; logs AUC, accuracy, precision, recall and F1 per class.

    Args:
        network: The classifier itself.
        optimisation: Optimiser and schedule.
        class_weighting: "balanced" weighs each class by the inverse of its share in training.
        threshold: "fixed" keeps the network's operating point; "youden" moves it, after every
            validation, to the largest sensitivity + specificity there (one-logit networks).
        label_smoothing: Share of the target given to all classes alike, in [0, 1).

    Raises:
        ValueError: If the network's outputs do not fit the data's classes, or a threshold is to
            be chosen for a network with several logits.
    """

    class_weight: Tensor

    def __init__(
        self,
        network: Network,
        optimisation: Optimisation | None = None,
        class_weighting: Literal["none", "balanced"] = "none",
        threshold: Literal["fixed", "youden"] = "fixed",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if threshold == "youden" and network.num_logits > 1:
            raise ValueError("threshold 'youden' is for one-logit networks; use 'fixed'.")
        self.network = network
        self.optimisation = optimisation or Optimisation()
        self.class_weighting, self.threshold_rule = class_weighting, threshold
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", torch.ones(network.num_classes), persistent=False)
        metrics = classification_metrics(network.num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.logits, self.labels = CatMetric(), CatMetric()  # of one validation, for the threshold
        self.data_class_names: list[str] = []

    def setup(self, stage: str) -> None:
        """Compare the network with the data, take over class names and class shares."""
        data: LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        names = list(getattr(data, "class_names", []))
        if not names:
            return
        if len(names) != self.network.num_classes:
            raise ValueError(
                f"the data has {len(names)} classes {names}, but the network decides between "
                f"{self.network.num_classes}; set num_logits to "
                f"{1 if len(names) == 2 else len(names)}."
            )
        if self.network.class_names != [str(k) for k in range(len(names))]:
            check_classes(self.network.class_names, names)
        self.network.class_names = self.network.recipe["class_names"] = names
        self.data_class_names = names
        if self.class_weighting == "balanced" and stage == "fit":
            labels = torch.tensor([record.label for record in data.splits["train"]])  # type: ignore[union-attr]
            counts = labels.bincount(minlength=len(names)).clamp(min=1)
            self.class_weight = (counts.sum() / (len(names) * counts)).to(self.class_weight)

    def on_train_start(self) -> None:
        """Check that a resumed schedule reaches to the end."""
        check_plan(self.trainer)

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Weighted cross-entropy, binary for one logit."""
        if self.network.num_logits > 1:
            return functional.cross_entropy(
                logits, label, self.class_weight, label_smoothing=self.label_smoothing
            )
        target = label.to(logits) * (1 - self.label_smoothing) + self.label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(
            logits[:, 0], target, self.class_weight[label]
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.loss(self.network(batch["image"]), batch["label"])
        self.log("train/loss", loss, batch_size=len(batch["label"]), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and metrics of one batch."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and metrics of one batch."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection, name: str) -> None:
        logits, label = self.network(batch["image"]), batch["label"]
        loss = self.loss(logits, label)
        # A float: Lightning's mean over processes rounds a whole number of images down.
        size: Any = float(len(label))
        self.log(name, loss, batch_size=size, sync_dist=True, prog_bar=name == "val/loss")
        if self.threshold_rule == "youden" and name == "val/loss":
            self.logits.update(logits)
            self.labels.update(label)
        else:
            update(metrics, logits, label, self.network.threshold)

    def on_validation_epoch_end(self) -> None:
        """Move the operating point if asked to, then log the metrics of the epoch."""
        if self.threshold_rule == "youden":
            scores = self.logits.compute()[:, 0].sigmoid()  # of all processes
            best = youden_threshold(scores, self.labels.compute().long())
            self.network.set_threshold(best)
            self.log("val/threshold", best)
            for logits, label in zip(self.logits.value, self.labels.value, strict=True):  # its own
                update(self.val_metrics, logits, label.long(), best)
            self.logits.reset()
            self.labels.reset()
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split."""
        self._log_metrics(self.test_metrics)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        values = named_metrics(metrics, self.network.class_names)
        self.log_dict(values, prog_bar=False)
        metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam and its schedule."""
        return self.optimisation.configure(self.parameters(), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint complete by itself."""
        checkpoint["network"] = dict(self.network.recipe)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the operating point and class names of the checkpoint."""
        names = checkpoint["network"]["class_names"]
        if self.data_class_names:
            check_classes(names, self.data_class_names)
        self.network.set_threshold(checkpoint["network"]["threshold"])
        self.network.class_names = self.network.recipe["class_names"] = names


def classification_metrics(classes: int) -> MetricCollection:
    """AUC (one against the rest, mean), accuracy, and precision, recall, F1 of every class."""
    return MetricCollection(
        {
            "auc": MulticlassAUROC(classes),
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "precision": MulticlassPrecision(classes, average="none"),
            "recall": MulticlassRecall(classes, average="none"),
            "f1": MulticlassF1Score(classes, average="none"),
        },
        compute_groups=False,  # the AUC reads probabilities, the others decisions
    )


def update(metrics: MetricCollection, logits: Tensor, label: Tensor, threshold: float) -> None:
    """Add a batch: probabilities to the AUC, decisions at the operating point to the rest."""
    decision = decide(logits, threshold)
    for name, metric in metrics.items(keep_base=True):
        metric.update(probabilities(logits) if name == "auc" else decision, label)


def named_metrics(metrics: MetricCollection, class_names: list[str]) -> dict[str, Tensor]:
    """Computed metrics as scalars; those per class end in the class's name."""
    values: dict[str, Tensor] = {}
    for name, value in metrics.compute().items():
        if value.ndim:
            values |= {f"{name}_{k}": v for k, v in zip(class_names, value, strict=True)}
        else:
            values[name] = value
    return values


def youden_threshold(probability: Tensor, label: Tensor) -> float:
    """Operating point with the largest sensitivity + specificity - 1 (Youden's J).

    Halfway between the two neighbouring scores, inside (0, 1); 0.5 where only one class is there.
    """
    if bool((label == label[0]).all()):
        return 0.5
    false_positive, true_positive, thresholds = binary_roc(probability.double(), label)
    best = int((true_positive - false_positive).argmax())
    at = float(thresholds[best])
    below = probability[probability.double() < at]
    lower = float(below.max()) if below.numel() else 0.0
    return min(max((at + lower) / 2, 1e-4), 1 - 1e-4)
