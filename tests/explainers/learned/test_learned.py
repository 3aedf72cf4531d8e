from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from classifiers import Classifier
from classifiers.network import Network, decide, load_network
from classifiers.optimisation import Optimisation
from datamodules import Phantom
from datamodules.base import Loading, Record
from explainers.learned import (
    Adversarial,
    CyCE,
    CycleWeights,
    Duo,
    Geometry,
    LearnedExplainer,
    MaskGenerator,
    MaskWeights,
    Single,
    SyCE,
    Weights,
    load_explainer,
)
from explainers.learned.generators import trainable
from explainers.learned.losses import (
    decision_loss,
    distance,
    margin_adversarial,
    margin_similar,
    total_variation,
    weight_proximity,
)
from explainers.views import Views

SMALL = Geometry(widths=(4, 6))
QUICK = Optimisation(learning_rate=1e-2, schedule="constant")
WEIGHTS = Weights(3.0, 2.0, 0.5, 0.25, 0.75, 0.125, 0.0625)
CLASSES: list[type[Single] | type[Duo] | type[Adversarial]] = [Single, Duo, Adversarial]


def images(count: int = 4, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dark = torch.linspace(0.2, 1, count)[:, None, None, None]
    return dark * torch.rand(count, channels, 32, 32, generator=generator)


def network(num_logits: int = 1, threshold: float = 0.5) -> Network:
    """A classifier that decides both classes on `images`."""
    torch.manual_seed(0)
    built = Network("test_resnet", num_logits)
    built(images(8))  # moves the statistics of its batch norms
    built.eval().requires_grad_(False)
    head = built.backbone.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    head.weight.mul_(100)
    head.bias.sub_(built(images()).median(0).values - log(threshold / (1 - threshold)))
    built.set_threshold(threshold)
    return built


def loader(channels: int = 1) -> DataLoader[dict[str, Tensor]]:
    parts = [images(4, channels, seed) for seed in range(3)]
    return DataLoader([{"image": part} for part in parts], batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | options,
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (0, 0), (1, 1)])
def test_epochs_are_mostly_abnormal_where_nothing_else_is_asked_for(
    asked: int | None, expected: int
) -> None:
    optimisation = Optimisation(abnormal_per_normal=asked)
    explainer = Single(network(), geometry=SMALL, optimisation=optimisation)
    assert explainer.optimisation.abnormal_per_normal == expected
    assert explainer.arguments()["optimisation"]["abnormal_per_normal"] == expected
    assert optimisation.abnormal_per_normal == asked  # a classifier's is left alone


# generators and heads


@pytest.mark.parametrize("build", CLASSES)
@pytest.mark.parametrize(("output", "reduction"), [("sigmoid", 1), ("clip", 1), ("delta", 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_generated_images_are_images(
    build: type[Single],
    output: Literal["sigmoid", "clip", "delta"],
    reduction: int,
    channels: Literal[1, 3],
) -> None:
    geometry = Geometry("plain", (4, 6), channels, output, reduction=reduction)
    explainer = build(network(), geometry=geometry)
    for generated in explainer(images(2, channels)):
        assert generated.shape == (2, channels, 32, 32)
        assert generated.min() >= 0
        assert generated.max() <= 1


@pytest.mark.parametrize("k", [1, 2, 4])
def test_single_has_k_convolutions_per_head(k: int) -> None:
    explainer = Single(network(), k, geometry=SMALL)
    for part in (explainer.similar_head, explainer.adversarial_head):
        kernels = [p.shape[2:] for p in part.parameters() if p.ndim == 4]
        assert kernels == [(3, 3)] * k


def test_single_of_the_authors_has_their_number_of_weights() -> None:
    explainer = Single(network(), "authors", geometry=Geometry("residual", (16, 32, 64), 1, "clip"))
    assert sum(p.numel() for p in explainer.parameters() if p.requires_grad) == 232_244


def test_single_shares_its_features_and_duo_shares_nothing() -> None:
    single, duo = Single(network(), 1, geometry=SMALL), Duo(network(), geometry=SMALL)
    for explainer, shared in ((single, True), (duo, False)):
        explainer.eval()
        similar, adversarial = explainer(images())
        weights = trainable(explainer)
        one = torch.autograd.grad(similar.sum(), weights, retain_graph=True, allow_unused=True)
        two = torch.autograd.grad(adversarial.sum(), weights, allow_unused=True)
        both = [a is not None and b is not None for a, b in zip(one, two, strict=True)]
        assert any(both) == shared


def test_paired_weights_are_heads_or_whole_generators() -> None:
    single, duo = Single(network(), 2, geometry=SMALL), Duo(network(), geometry=SMALL)
    first, second = (list(weights) for weights in single.paired_weights())
    assert [w.shape for w in first] == [p.shape for p in single.similar_head.parameters()]
    assert first[0] is single.similar_head[0].weight
    assert second[0] is single.adversarial_head[0].weight
    weights = {id(w) for part in duo.paired_weights() for w in part}
    assert weights == {id(p) for p in duo.parameters() if p.requires_grad}


def test_duo_leaves_frozen_encoder_weights_out_of_the_proximity() -> None:
    duo = Duo(network(), geometry=Geometry("resnet18", (4, 6)))
    weights = [w for part in duo.paired_weights() for w in part]
    assert weights
    assert all(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("convolutions", [0, -2])
def test_single_needs_a_convolution(convolutions: int) -> None:
    with pytest.raises(ValueError, match=f"convolutions must be 1 or more, but got {convolutions}"):
        Single(network(), convolutions, geometry=SMALL)


# objective


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("build", [Single, Duo])
def test_objective_is_the_weighted_sum_of_its_terms(
    build: type[Single] | type[Duo], threshold: float
) -> None:
    explainer = build(network(threshold=threshold), weights=WEIGHTS, geometry=SMALL).eval()
    image = images()
    similar, adversarial = explainer(image)
    y = explainer.network.decide(image)
    assert set(y.tolist()) == {0, 1}
    f = explainer.network
    expected = {
        "similar": 3.0 * distance(image, similar),
        "adversarial": 2.0 * distance(image, adversarial),
        "pair": 0.5 * distance(similar, adversarial),
        "classify_similar": 0.25 * decision_loss(f(similar), y, threshold),
        "classify_adversarial": 0.75 * decision_loss(f(adversarial), 1 - y, threshold),
        "proximity": 0.125 * weight_proximity(*explainer.paired_weights()),
        "variation": 0.0625 * total_variation(similar - adversarial),
    }
    expected["loss"] = torch.stack(list(expected.values())).sum()
    terms, generated = explainer.objective(image)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(terms[name], value, msg=name)
    assert_close(generated["similar"], similar)
    assert_close(generated["logits_adversarial"], f(adversarial))


def test_the_naive_objective_has_three_terms() -> None:
    explainer = Adversarial(network(), WEIGHTS, SMALL).eval()
    image = images()
    _, adversarial = explainer(image)
    y = explainer.network.decide(image)
    by_hand = (
        2.0 * distance(image, adversarial)
        + 0.75 * decision_loss(explainer.network(adversarial), 1 - y)
        + 0.0625 * total_variation(image - adversarial)
    )
    assert_close(explainer.objective(image)[0]["loss"], by_hand)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_margin_objective(num_logits: int) -> None:
    f = network(num_logits)
    explainer = Single(f, 1, WEIGHTS, SMALL, objective="margin", margin=0.7).eval()
    image = images()
    y = f.decide(image)
    logits = [f(generated) for generated in explainer(image)]
    if num_logits == 1:
        logits = [torch.cat([torch.zeros_like(z), z], 1) for z in logits]
    terms, _ = explainer.objective(image)
    assert_close(terms["classify_similar"], 0.25 * margin_similar(logits[0], y, 0.7))
    assert_close(terms["classify_adversarial"], 0.75 * margin_adversarial(logits[1], y, 0.7))


def test_the_objective_follows_the_number_of_logits() -> None:
    assert Single(network(), geometry=SMALL).objective_form == "cross_entropy"
    assert Single(network(3), geometry=SMALL).objective_form == "margin"
    with pytest.raises(ValueError, match="needs a one-logit network, this one has 3 logits"):
        Single(network(3), geometry=SMALL, objective="cross_entropy")


# training


@pytest.mark.parametrize("build", CLASSES)
def test_training_moves_the_generators_and_never_the_classifier(
    build: type[Single], tmp_path: Path
) -> None:
    f = network()
    explainer = build(f, geometry=SMALL, optimisation=QUICK)
    before, whole = snapshot(f), snapshot(explainer)
    modes: set[bool] = set()
    f.register_forward_hook(lambda module, *_: modes.add(any(m.training for m in module.modules())))
    trainer(tmp_path).fit(explainer, loader(), loader())
    assert unchanged(f, before)
    assert modes == {False}
    assert not any(p.requires_grad or p.grad is not None for p in f.parameters())
    own = [k for k in whole if not k.startswith("network.") and whole[k].is_floating_point()]
    assert all(not torch.equal(explainer.state_dict()[k], whole[k]) for k in own)


def test_train_keeps_the_classifier_in_eval_mode() -> None:
    explainer = Single(network(), geometry=SMALL)
    explainer.train()
    assert all(part.training for part in explainer.unet.modules())
    assert not any(part.training for part in explainer.network.modules())


@pytest.mark.parametrize(("num_logits", "objective"), [(3, "auto"), (1, "margin"), (1, "auto")])
def test_training_lowers_the_objective(
    num_logits: int, objective: Literal["auto", "margin"], tmp_path: Path
) -> None:
    explainer = Single(
        network(num_logits), 1, geometry=SMALL, optimisation=QUICK, objective=objective
    )
    run = trainer(tmp_path, max_epochs=5)
    first = float(explainer.eval().objective(images())[0]["loss"].detach())
    run.fit(explainer.train(), loader(), loader())
    assert float(run.callback_metrics["val/loss"]) < 0.9 * first
    assert {f"train/{name}" for name in explainer.objective(images())[0]} <= {*run.callback_metrics}


def test_the_classification_weights_follow_the_share_flipped(tmp_path: Path) -> None:
    """One step of each of three batches; the checkpoint goes on with the factor it had."""
    weights = replace(WEIGHTS, flipped=0.75, rate=0.5)
    explainer = Single(network(), 1, weights, SMALL, QUICK)
    missing = torch.zeros(2)

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, _: int) -> None:
            generated = module.objective(batch["image"])[1]
            before, after = (decide(generated[k], 0.5) for k in ("logits", "logits_adversarial"))
            for label in (0, 1):
                there = before == label
                share = float((after != label)[there].float().mean())
                missing[label] += 2 * there.float().mean() * (0.75 - share)

    run = trainer(tmp_path, callbacks=[Watch()])
    run.fit(explainer, loader())
    assert missing.unique().numel() == 2
    expected = 0.5 * missing
    assert_close(explainer.log_factor, expected)
    assert_close(run.callback_metrics["train/factor_class1"], expected[1].exp())
    explainer.eval()
    terms, generated = explainer.objective(images())
    y = decide(generated["logits"], 0.5)
    losses = {
        "classify_similar": (0.25, generated["logits_similar"], y),
        "classify_adversarial": (0.75, generated["logits_adversarial"], 1 - y),
    }
    for name, (weight, logits, wanted) in losses.items():
        each = [decision_loss(logits[i : i + 1], wanted[i : i + 1]) for i in range(len(y))]
        assert_close(terms[name], weight * (expected.exp()[y] * torch.stack(each)).mean())
    run.save_checkpoint(tmp_path / "explainer.ckpt")
    loaded = load_explainer(tmp_path / "explainer.ckpt")
    assert isinstance(loaded, Single)
    assert loaded.weights == weights
    assert_close(loaded.log_factor, expected)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_not_all_decisions_can_be_asked_for(share: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), but got"):
        Weights(flipped=share)


def test_the_data_must_fit_the_classifier_and_the_geometry() -> None:
    explainer = Single(network(), geometry=SMALL)
    data = SimpleNamespace(class_names=["0", "1"], loading=SimpleNamespace(channels=1))
    explainer.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    explainer.setup("fit")
    data.class_names = ["normal", "lesion"]
    with pytest.raises(ValueError, match=r"classes \['0', '1'\], but the data has \['normal'"):
        explainer.setup("fit")
    data.class_names, data.loading.channels = ["0", "1"], 3
    with pytest.raises(ValueError, match=r"3 channels.* is 1: set model\.geometry\.channels to 3"):
        explainer.setup("fit")


class Rare(Phantom):
    """A phantom with a fifth of the opacities."""

    def records(self) -> list[Record]:
        every = super().records()
        return [record for k, record in enumerate(every) if not record.label or k % 5 == 1]


class Labels(Callback):
    """Labels of the images of training."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: object, module: object, batch: Any, _: int) -> None:
        self.seen += batch["label"].tolist()


@pytest.mark.parametrize("learned", [True, False])
def test_rare_evidence_is_most_of_what_an_explainer_learns_from_alone(
    learned: bool, tmp_path: Path
) -> None:
    data = Rare(train=40, val=10, test=10, loading=Loading(size=32, batch_size=4))
    classifier = Network("test_resnet", class_names=list(data.class_names))
    module = (
        Single(classifier, geometry=SMALL, optimisation=QUICK)
        if learned
        else Classifier(classifier, QUICK)
    )
    labels = Labels()
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 1}
    options |= {"enable_checkpointing": False, "limit_val_batches": 0, "callbacks": [labels]}
    Trainer(**options, default_root_dir=tmp_path, enable_progress_bar=False).fit(module, data)
    assert len(labels.seen) == 24
    assert sum(labels.seen) == (20 if learned else 4)


# explaining


@pytest.mark.parametrize("build", CLASSES)
def test_the_map_is_the_difference_of_the_two_images(build: type[Single]) -> None:
    explainer = build(network(), geometry=Geometry(widths=(4, 6), channels=3))
    image = images(3, 3)
    similar, adversarial = explainer.eval()(image)
    by_hand = torch.stack([(similar[:, c] - adversarial[:, c]).abs() for c in range(3)]).sum(0) / 3
    assert_close(explainer.explain(image), by_hand.detach())


def test_naive_map_compares_with_the_image_itself() -> None:
    explainer = Adversarial(network(), geometry=SMALL).eval()
    image = images()
    assert torch.equal(explainer(image)[0], image)
    assert_close(explainer.explain(image), (image - explainer(image)[1]).abs()[:, 0].detach())


@pytest.mark.parametrize("build", CLASSES)
def test_a_map_costs_no_pass_of_the_classifier(build: type[Single]) -> None:
    explainer, calls = build(network(), geometry=SMALL), list[int]()
    explainer.network.register_forward_pre_hook(lambda *_: calls.append(1))
    maps = explainer.explain(images(), views=Views(2))
    assert not calls
    assert_close(maps, explainer.explain(images(), explainer.network.decide(images()), Views(2)))


@pytest.mark.parametrize("build", CLASSES)
def test_another_target_than_the_decision_is_refused(build: type[Single]) -> None:
    explainer = build(network(), geometry=SMALL)
    decision = explainer.network.decide(images())
    assert_close(explainer.explain(images(), decision), explainer.explain(images()))
    wrong = decision.clone()
    wrong[2] = 1 - wrong[2]
    message = rf"image 2 is decided as class {decision[2]}, but target {wrong[2]}"
    with pytest.raises(ValueError, match=message):
        explainer.explain(images(), wrong)


def test_a_view_may_be_decided_otherwise() -> None:
    class TopHalf(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image[:, :1, :16].mean((2, 3)) - image[:, :1, 16:].mean((2, 3))

    f = network()
    f.backbone = TopHalf()
    image = torch.zeros(2, 1, 32, 32)
    image[:, :, :16] = 1
    views = Views(4, 0.0, 0.0, 0.0, 0.0, vertical_flip=1.0)
    assert f.decide(image).tolist() == [1, 1]
    assert f.decide(image.flip(2)).tolist() == [0, 0]
    assert Single(f, geometry=SMALL).explain(image, views=views).shape == (2, 32, 32)


@pytest.mark.parametrize("fails", [False, True])
def test_explain_leaves_the_explainer_as_it_was(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer = Single(network(), geometry=SMALL)
    explainer.train()
    explainer.similar_head.eval()
    next(explainer.adversarial_head.parameters()).requires_grad_(False)
    modes = [part.training for part in explainer.modules()]
    flags = [weight.requires_grad for weight in explainer.parameters()]
    before = snapshot(explainer)
    if fails:
        monkeypatch.setattr(explainer.unet, "forward", lambda image: image / "text")
        with pytest.raises(TypeError):
            explainer.explain(images())
    else:
        explainer.explain(images(), views=Views(2))
    assert modes == [part.training for part in explainer.modules()]
    assert flags == [weight.requires_grad for weight in explainer.parameters()]
    assert unchanged(explainer, before)


# checkpoints

Build = Callable[[Network], LearnedExplainer]
BUILDS: dict[str, Build] = {
    "Single": lambda f: Single(f, 2, WEIGHTS, SMALL, QUICK, "margin", 0.3),
    "authors": lambda f: Single(
        f, "authors", geometry=Geometry("residual", (4, 6), 1, "clip"), optimisation=QUICK
    ),
    "encoder": lambda f: Single(f, 1, None, Geometry("resnet18", (4, 6)), QUICK),
    "Duo": lambda f: Duo(f, WEIGHTS, SMALL, QUICK),
    "Adversarial": lambda f: Adversarial(f, WEIGHTS, SMALL, QUICK),
    "MaskGenerator": lambda f: MaskGenerator(
        f, True, "noise", 0.1, MaskWeights(1.0, 2.0, 3.0, 0.4), SMALL, QUICK
    ),
    "SyCE": lambda f: SyCE(f, CycleWeights(symmetry=3.0), SMALL, QUICK, (4, 6)),
    "CyCE": lambda f: CyCE(f, None, SMALL, QUICK, (4,)),
}


def classifier_file(folder: Path) -> Path:
    f = network(threshold=0.4)
    f.class_names = f.recipe["class_names"] = ["normal", "lesion"]
    state = {f"network.{name}": value for name, value in f.state_dict().items()}
    torch.save({"network": dict(f.recipe), "state_dict": state}, folder / "classifier.ckpt")
    return folder / "classifier.ckpt"


def save(explainer: LearnedExplainer, folder: Path) -> None:
    run = trainer(folder)
    run.strategy.connect(explainer)
    run.save_checkpoint(folder / "explainer.ckpt", weights_only=True)


@pytest.mark.parametrize("name", BUILDS)
def test_a_checkpoint_is_complete_by_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = classifier_file(tmp_path)
    explainer = BUILDS[name](load_network(file))
    run = trainer(tmp_path)
    run.fit(explainer, loader(), loader())
    run.save_checkpoint(tmp_path / "explainer.ckpt")
    file.unlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    loaded = load_explainer("../explainer.ckpt")
    assert type(loaded) is type(explainer)
    assert loaded.arguments() == explainer.arguments()
    assert loaded.network.recipe == explainer.network.recipe
    assert loaded.network.threshold == 0.4
    assert not any(part.training for part in loaded.modules())
    assert not any(weight.requires_grad for weight in loaded.network.parameters())
    assert torch.equal(loaded.explain(images()), explainer.explain(images()))
    from_explainer = load_network("../explainer.ckpt")
    assert torch.equal(from_explainer(images()), explainer.network(images()))


def test_the_network_may_be_named_by_its_checkpoint(tmp_path: Path) -> None:
    explainer = Single(str(classifier_file(tmp_path)), geometry=SMALL)
    assert explainer.network.class_names == ["normal", "lesion"]
    assert_close(explainer.network(images()), network(threshold=0.4)(images()))


def test_resuming_takes_over_the_operating_point(tmp_path: Path) -> None:
    save(Single(network(threshold=0.3), geometry=SMALL, optimisation=QUICK), tmp_path)
    other = Single(network(), geometry=SMALL, optimisation=QUICK)
    trainer(tmp_path).validate(
        other, loader(), ckpt_path=str(tmp_path / "explainer.ckpt"), verbose=False
    )
    assert other.network.threshold == other.network.recipe["threshold"] == 0.3


def test_loading_never_downloads_the_encoders_weights(tmp_path: Path) -> None:
    save(BUILDS["encoder"](network()), tmp_path)
    content = torch.load(tmp_path / "explainer.ckpt", weights_only=True)
    content["explainer"]["arguments"]["geometry"]["encoder_weights"] = "imagenet"
    torch.save(content, tmp_path / "explainer.ckpt")
    loaded = load_explainer(tmp_path / "explainer.ckpt")
    assert loaded.geometry.encoder_weights is None


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"explainer": {"class": "Mystery", "arguments": {}}},
        {"explainer": "Single"},
        [1, 2],
    ],
)
def test_a_file_without_an_explainer_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt' holds none of \['Adversarial', 'CyCE'"):
        load_explainer(tmp_path / "other.ckpt")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    for name in ("broken.ckpt", "missing.ckpt"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            load_explainer(tmp_path / name)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    torch.save({"explainer": SimpleNamespace()}, tmp_path / "pickle.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_explainer(tmp_path / "pickle.ckpt")
