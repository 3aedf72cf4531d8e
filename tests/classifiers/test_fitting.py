"""Training until the images are learnt by heart."""

from __future__ import annotations

from pathlib import Path

import pytest

from classifiers import Classifier, Network, Optimisation
from classifiers.fitting import fit_by_heart
from datamodules import Phantom, Relabelled
from datamodules.base import Loading


def shuffled() -> Relabelled:
    return Relabelled(Phantom(train=16, val=4, test=4, loading=Loading(size=32, batch_size=8)))


def classifier() -> Classifier:
    return Classifier(Network("resnet18"), Optimisation(1e-3, "constant"))


def test_shuffled_labels_are_learnt(tmp_path: Path) -> None:
    module, data = classifier(), shuffled()
    fit_by_heart(module, data.train_dataloader(), data.loader("train"), 1.0, 40, tmp_path, "cpu")
    batches = list(data.loader("train"))
    for batch in batches:
        assert module.network.eval().decide(batch["image"]).equal(batch["label"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_too_few_epochs_warn(tmp_path: Path) -> None:
    images = shuffled().loader("train")
    with pytest.warns(UserWarning, match=r"after 1 epochs .* not 1.0: give more epochs"):
        fit_by_heart(classifier(), images, images, 1.0, 1, tmp_path, "cpu")


def test_an_impossible_accuracy_is_refused(tmp_path: Path) -> None:
    images = shuffled().loader("train")
    with pytest.raises(ValueError, match=r"in \(0, 1\], but got 1.2"):
        fit_by_heart(classifier(), images, images, 1.2, 1, tmp_path, "cpu")


def test_training_stops_at_the_accuracy(tmp_path: Path) -> None:
    """The second epoch is not run where the first is good enough."""
    module, images = classifier(), shuffled().loader("train")
    fit_by_heart(module, images, images, 0.1, 5, tmp_path, "cpu")
    assert module.trainer.current_epoch == 1
