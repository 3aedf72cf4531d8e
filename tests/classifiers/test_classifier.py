from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.testing import assert_close

from classifiers import Classifier, Network, Optimisation, load_network
from classifiers.classifier import youden_threshold
from classifiers.network import probabilities
from datamodules.base import ImageDataModule, Loading, Record, Sample


class Squares(ImageDataModule):
    """Noise, brighter by label; ``counts`` training images of each class, 20 in val and test."""

    def __init__(self, names: tuple[str, ...], counts: tuple[int, ...]) -> None:
        super().__init__(Loading(size=32, batch_size=8))
        self.class_names, self.counts = names, counts

    def records(self) -> list[Record]:
        labels = [label for label, count in enumerate(self.counts) for _ in range(count)]
        held = [i % len(self.counts) for i in range(20)]
        train = [Record(f"train{i}", label, "train") for i, label in enumerate(labels)]
        val = [Record(f"val{i}", label, "val") for i, label in enumerate(held)]
        return [*train, *val, *(Record(f"test{i}", k, "test") for i, k in enumerate(held))]

    def read(self, record: Record) -> Sample:
        generator = torch.Generator().manual_seed(sum(map(ord, record.id)))
        image = torch.rand(1, 32, 32, generator=generator) * 0.5 + 0.15 * record.label
        return Sample(image, None)


def trainer(folder: Path, epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def outputs(network: Network, data: ImageDataModule) -> tuple[Tensor, np.ndarray]:
    """Logits and labels of the test split, batch by batch."""
    with torch.inference_mode():
        batches = [(network(batch["image"]), batch["label"]) for batch in data.test_dataloader()]
    return torch.cat([z for z, _ in batches]), torch.cat([y for _, y in batches]).numpy()


@pytest.mark.parametrize("names", [("healthy", "ill"), ("normal", "benign", "malignant")])
def test_metrics_against_scikit_learn(names: tuple[str, ...], tmp_path: Path) -> None:
    data = Squares(names, (16,) * len(names))
    network = Network("test_resnet", num_logits=1 if len(names) == 2 else len(names))
    classifier = Classifier(network, Optimisation(learning_rate=1e-3))
    runner = trainer(tmp_path)
    runner.fit(classifier, data)
    logits, label = outputs(network.eval(), data)
    if len(names) == 2:  # an operating point off 0.5 that splits the images
        network.set_threshold(logits.sigmoid().median().item())
    scores = runner.test(classifier, data, verbose=False)[0]
    probability = probabilities(logits).numpy()
    decision = network.decide(torch.cat([b["image"] for b in data.test_dataloader()])).numpy()
    auc = roc_auc_score(
        label, probability[:, 1] if len(names) == 2 else probability, multi_class="ovr"
    )
    assert scores["test/auc"] == pytest.approx(auc, abs=1e-6)
    assert scores["test/accuracy"] == pytest.approx(accuracy_score(label, decision))
    expected = precision_recall_fscore_support(
        label, decision, labels=range(len(names)), zero_division=0
    )
    for name, values in zip(("precision", "recall", "f1"), expected, strict=False):
        found = [scores[f"test/{name}_{k}"] for k in names]
        assert found == pytest.approx(list(values), abs=1e-6)


def test_test_loss_is_the_mean_over_images(tmp_path: Path) -> None:
    data, classifier = Squares(("a", "b"), (4, 4)), Classifier(Network("test_resnet"))
    score = trainer(tmp_path).test(classifier, data, verbose=False)[0]["test/loss"]
    logits, label = outputs(classifier.network.eval(), data)
    of_truth = probabilities(logits)[torch.arange(20), torch.from_numpy(label)]
    assert score == pytest.approx(float(-of_truth.log().mean()), rel=1e-5)


def test_class_weighting_by_hand_and_against_scikit_learn(tmp_path: Path) -> None:
    data = Squares(("a", "b"), (24, 8))
    classifier = Classifier(Network("test_resnet"), class_weighting="balanced")
    trainer(tmp_path).fit(classifier, data)
    assert_close(classifier.class_weight, torch.tensor([32 / 48, 2.0]))
    labels = [0] * 24 + [1] * 8
    oracle = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert_close(classifier.class_weight, torch.from_numpy(oracle).float())
    # Logit 0 costs log 2 on either label: (2/3 + 2) / 2 of it.
    loss = classifier.loss(torch.zeros(2, 1), torch.tensor([0, 1]))
    assert_close(loss, torch.tensor(4 / 3 * np.log(2)).float())


@pytest.mark.parametrize("logits", [1, 2])
def test_label_smoothing_by_hand(logits: int) -> None:
    classifier = Classifier(Network("test_resnet", logits), label_smoothing=0.2)
    row = torch.tensor([[3.0]]).log() if logits == 1 else torch.tensor([[1.0, 3.0]]).log()
    expected = -(0.9 * np.log(0.75) + 0.1 * np.log(0.25))
    assert_close(classifier.loss(row, torch.tensor([1])), torch.tensor(expected).float())


def best_youden(probability: np.ndarray, label: np.ndarray) -> float:
    """Largest sensitivity + specificity - 1 over every threshold that changes a decision."""
    cuts = [*np.unique(probability), 1.0]
    return max(youden(probability, label, cut) for cut in cuts)


def youden(probability: np.ndarray, label: np.ndarray, threshold: float) -> float:
    positive = probability >= threshold
    return float(positive[label == 1].mean() + (~positive[label == 0]).mean() - 1)


@given(
    st.lists(st.tuples(st.integers(1, 999), st.booleans()), min_size=2, max_size=20).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
@settings(max_examples=100, deadline=None)
def test_youden_threshold_against_brute_force(pairs: list[tuple[int, bool]]) -> None:
    probability = torch.tensor([score / 1000 for score, _ in pairs])
    label = torch.tensor([int(label) for _, label in pairs])
    found = youden_threshold(probability, label)
    assert 0 < found < 1
    reached = youden(probability.numpy(), label.numpy(), found)
    assert reached == pytest.approx(best_youden(probability.numpy(), label.numpy()), abs=1e-6)


def test_youden_threshold_by_hand() -> None:
    label = torch.tensor([0, 0, 1, 1])
    assert youden_threshold(torch.tensor([0.1, 0.2, 0.6, 0.9]), label) == pytest.approx(0.4)
    assert youden_threshold(torch.tensor([0.1, 0.2]), torch.tensor([1, 1])) == 0.5


def test_youden_moves_the_operating_point_on_validation(tmp_path: Path) -> None:
    data = Squares(("a", "b"), (16, 16))
    classifier = Classifier(Network("test_resnet"), threshold="youden")
    runner = trainer(tmp_path)
    runner.fit(classifier, data)
    network = classifier.network.eval()
    with torch.inference_mode():
        batches = [(network(b["image"])[:, 0].sigmoid(), b["label"]) for b in data.val_dataloader()]
    probability, label = (torch.cat(part) for part in zip(*batches, strict=True))
    assert network.threshold == pytest.approx(youden_threshold(probability, label))
    assert float(runner.callback_metrics["val/threshold"]) == pytest.approx(network.threshold)
    right = (probability >= network.threshold) == label.bool()
    assert float(runner.callback_metrics["val/accuracy"]) == pytest.approx(
        float(right.float().mean())
    )
    with pytest.raises(ValueError, match="'youden' is for one-logit networks"):
        Classifier(Network("test_resnet", num_logits=3), threshold="youden")


def test_checkpoint_of_a_real_fit_loads_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Squares(("healthy", "ill"), (8, 8))
    classifier = Classifier(Network("test_resnet"), threshold="youden")
    runner = trainer(tmp_path)
    runner.fit(classifier, data)
    (tmp_path / "empty").mkdir()
    runner.save_checkpoint(tmp_path / "empty" / "a.ckpt")
    monkeypatch.chdir(tmp_path / "empty")
    again, image = load_network("a.ckpt"), torch.rand(3, 1, 32, 32)
    assert_close(again(image), classifier.network.eval()(image))
    assert again.threshold == classifier.network.threshold != 0.5
    assert again.class_names == ["healthy", "ill"]
    fresh = Classifier(Network("test_resnet"))
    trainer(tmp_path).validate(fresh, data, ckpt_path="a.ckpt", verbose=False)
    assert fresh.network.recipe == classifier.network.recipe


def test_one_cycle_of_a_real_fit_ends_low(tmp_path: Path) -> None:
    optimisation = Optimisation(learning_rate=0.01, schedule="one_cycle")
    classifier = Classifier(Network("test_resnet"), optimisation)
    used = []
    step = classifier.training_step

    def recorded(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        used.append(classifier.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return step(batch, batch_idx)

    classifier.training_step = recorded  # type: ignore[method-assign]
    trainer(tmp_path, epochs=2).fit(classifier, Squares(("a", "b"), (16, 16)))
    assert len(used) == 8
    assert max(used) > 0.008
    assert used[-1] < 1e-5


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            {},
            r"3 classes \['a', 'b', 'c'\], but the network decides between 2; set num_logits to 3",
        ),
        (
            {"num_logits": 3, "class_names": ["c", "b", "a"]},
            r"trained on classes \['c', 'b', 'a'\], but the data has \['a', 'b', 'c'\]; give",
        ),
    ],
)
def test_classes_of_data_and_network_differ(
    network: dict[str, object], message: str, tmp_path: Path
) -> None:
    classifier = Classifier(Network("test_resnet", **network))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(classifier, Squares(("a", "b", "c"), (4, 4, 4)))


def test_classes_of_data_and_checkpoint_differ(tmp_path: Path) -> None:
    runner = trainer(tmp_path)
    runner.fit(Classifier(Network("test_resnet")), Squares(("a", "b"), (8, 8)))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"trained on classes \['a', 'b'\], but the data has \['b', 'a'\]"
    ):
        trainer(tmp_path).test(
            Classifier(Network("test_resnet")),
            Squares(("b", "a"), (8, 8)),
            ckpt_path=tmp_path / "a.ckpt",
        )
