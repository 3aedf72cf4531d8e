from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning.pytorch import Trainer
from networks import network_around
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.learned import CyCE, CycleWeights, Geometry, SyCE
from explainers.learned.cycle import Conditional, critic
from explainers.learned.losses import decision_loss, distance

SMALL = Geometry(widths=(4, 6))
WEIGHTS = CycleWeights(3.0, 2.0, 0.7, 0.5, 0.3, 0.2, 1.5)
CLASSES: list[type[SyCE] | type[CyCE]] = [SyCE, CyCE]


class Bright(nn.Module):
    """Class 1 where the upper left quarter is bright."""

    def forward(self, image: Tensor) -> Tensor:
        return (20 * image.mean(1)[:, :6, :6].mean((1, 2)) - 10)[:, None]


def bright() -> Network:
    network = network_around(Bright())
    network.mean.zero_()
    network.std.fill_(1.0)
    return network


def both(count: int = 4, seed: int = 0) -> Tensor:
    """Images of which every second one is bright in its upper left quarter."""
    image = 0.4 * torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    image[::2, :, :6, :6] += 0.6
    return image


def images_by_hand(explainer: Conditional, image: Tensor, wanted: list[int]) -> Tensor:
    parts = zip(image[:, None], wanted, strict=True)
    return torch.cat([explainer.generators[label](one).sigmoid() for one, label in parts])


def test_the_objective_of_syce_by_hand() -> None:
    torch.manual_seed(0)
    explainer, image = SyCE(bright(), WEIGHTS, SMALL).eval(), both()
    decision = torch.tensor([1, 0, 1, 0])
    assert torch.equal(explainer.network.decide(image), decision)
    adversarial = images_by_hand(explainer, image, [0, 1, 0, 1])
    stable = images_by_hand(explainer, adversarial, [1, 0, 1, 0])
    cycled = images_by_hand(explainer, stable, [0, 1, 0, 1])
    scores = [
        explainer.discriminators[k](x[None]) for k, x in zip([0, 1, 0, 1], adversarial, strict=True)
    ]
    f, w = explainer.network, WEIGHTS
    flipped = decision_loss(f(adversarial), 1 - decision)
    expected = {
        "symmetry": w.symmetry * distance(image, stable),
        "cycle": w.cycle * distance(adversarial, cycled),
        "classify_adversarial": w.classify_adversarial * flipped,
        "classify_stable": w.classify_stable * decision_loss(f(stable), decision),
        "classify_cycle": w.classify_cycle * decision_loss(f(cycled), 1 - decision),
        "adversary": -w.adversary * torch.cat(scores).mean(),
    }
    terms, generated = explainer.objective(image)
    assert set(terms) == {*expected, "loss"}
    for name, value in expected.items():
        assert_close(terms[name], value)
    assert_close(terms["loss"], torch.stack(list(expected.values())).sum())
    assert_close(generated["similar"], stable)
    assert_close(generated["adversarial"], adversarial)
    assert_close(generated["logits_adversarial"], f(adversarial))
    assert_close(generated["logits_similar"], f(stable))
    assert_close(explainer.explain(image), (stable - adversarial).abs()[:, 0].detach())


def test_the_objective_of_cyce_by_hand() -> None:
    torch.manual_seed(0)
    explainer, image = CyCE(bright(), WEIGHTS, SMALL).eval(), both()
    decision = torch.tensor([1, 0, 1, 0])
    adversarial = images_by_hand(explainer, image, [0, 1, 0, 1])
    cycled = images_by_hand(explainer, adversarial, [1, 0, 1, 0])
    f, w = explainer.network, WEIGHTS
    terms, generated = explainer.objective(image)
    assert_close(terms["cycle"], w.cycle * distance(image, cycled))
    flipped = w.classify_adversarial * decision_loss(f(adversarial), 1 - decision)
    assert_close(terms["classify_adversarial"], flipped)
    assert_close(terms["classify_cycle"], w.classify_cycle * decision_loss(f(cycled), decision))
    assert set(terms) == {"cycle", "classify_adversarial", "classify_cycle", "adversary", "loss"}
    assert torch.equal(generated["similar"], image)
    assert_close(explainer.explain(image), (image - adversarial).abs()[:, 0].detach())


def test_the_papers_weights_are_the_defaults() -> None:
    explainer = SyCE(bright(), geometry=SMALL)
    assert explainer.weights == CycleWeights(10, 2, 0.2, 0.01, 0.005, 0.25, 1)
    assert explainer.optimisation.abnormal_per_normal == 1
    assert CyCE(bright(), geometry=SMALL).weights == CycleWeights(0, 10, 0.2, 0, 0.005, 0.25, 1)


def test_the_discriminators_loss_by_hand() -> None:
    torch.manual_seed(0)
    explainer = SyCE(bright(), WEIGHTS, SMALL)
    explainer.discriminators = nn.ModuleList([Sum(2.0), Sum(5.0)])  # slope of every pixel 2 or 5
    image, drawn, decision = both(2), torch.zeros(2, 1, 12, 12), torch.tensor([1, 0])
    loss = explainer.discriminate(image, drawn, decision)
    real = 5 * image[0].sum() + 2 * image[1].sum()
    penalty = (2 * 12 - 1) ** 2 + (5 * 12 - 1) ** 2  # the norm over 144 pixels is 12 slopes
    assert_close(loss, -real + 1.5 * penalty)
    assert explainer.discriminate(image[:1], drawn[:1], decision[:1]).item() == 0


class Sum(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, image: Tensor) -> Tensor:
        return self.slope * image.flatten(1).sum(1)


def test_the_discriminators_levels() -> None:
    judge = critic(3, (32, 64, 96))
    shapes = [tuple(p.shape) for p in judge.parameters() if p.ndim == 4]
    assert shapes == [
        (32, 3, 3, 3),
        (32, 32, 3, 3),
        (64, 32, 3, 3),
        (64, 64, 3, 3),
        (96, 64, 3, 3),
        (96, 96, 3, 3),
        (1, 96, 1, 1),
    ]
    assert judge(torch.rand(2, 3, 24, 24)).shape == (2,)


@pytest.mark.parametrize(("build", "schedule"), [(SyCE, "one_cycle"), (CyCE, "plateau")])
def test_training_moves_every_part_and_flips_decisions(
    build: type[SyCE] | type[CyCE],
    schedule: Literal["one_cycle", "plateau"],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    optimisation = Optimisation(learning_rate=1e-2, schedule=schedule, patience=1)
    explainer = build(bright(), None, SMALL, optimisation, (4,))
    before = {name: value.clone() for name, value in explainer.state_dict().items()}
    data = DataLoader([{"image": both(6, k)} for k in range(30)], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(explainer, data, data)
    for name, value in explainer.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (not name.startswith("network.")), name
    image = both(6, 99)
    _, adversarial = explainer.eval()(image)
    assert torch.equal(explainer.network.decide(adversarial), 1 - explainer.network.decide(image))
    rates = [optimiser.param_groups[0]["lr"] for optimiser in trainer.optimizers]
    assert rates[1] == 1e-2
    assert rates[0] < 1e-4 if schedule == "one_cycle" else rates[0] <= 1e-2


@pytest.mark.parametrize("build", CLASSES)
def test_a_batch_of_one_class_and_several_logits(build: type[SyCE] | type[CyCE]) -> None:
    explainer = build(bright(), geometry=SMALL).eval()
    image = both()
    assert_close(explainer.explain(image[::2]), explainer.explain(image)[::2])
    with pytest.raises(ValueError, match=r"CE needs a one-logit network, this one has 3 logits"):
        build(Network("test_resnet", 3), geometry=SMALL)
