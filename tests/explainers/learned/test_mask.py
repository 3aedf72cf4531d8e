from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from networks import network_around
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from classifiers.network import Network, probabilities
from classifiers.optimisation import Optimisation
from explainers.learned import Geometry, MaskGenerator, MaskWeights
from explainers.learned.losses import squared_variation
from explainers.learned.mask import log_probability
from explainers.views import blurred

SMALL = Geometry(widths=(8, 12))


class Spot(nn.Module):
    """Class 1 where the middle of the image has stripes."""

    def forward(self, image: Tensor) -> Tensor:
        edges = image.mean(1)[:, 8:16, 8:16].diff(dim=2).abs().mean((1, 2))
        return (20 * edges - 4)[:, None]


def spot() -> Network:
    network = network_around(Spot())
    network.mean.zero_()
    network.std.fill_(1.0)
    return network


def striped(count: int = 4, seed: int = 0) -> Tensor:
    stripes = (torch.arange(24) % 4 < 2).float().expand(count, 1, 24, 24)
    noise = torch.rand(count, 1, 24, 24, generator=torch.Generator().manual_seed(seed))
    return 0.9 * stripes + 0.1 * noise


def test_the_objective_by_hand() -> None:
    torch.manual_seed(0)
    explainer = MaskGenerator(spot(), weights=MaskWeights(2.0, 3.0, 4.0, 0.5), geometry=SMALL)
    assert explainer.optimisation.abnormal_per_normal == 1
    image, weights = striped(3), explainer.weights
    decision = explainer.network.decide(image)
    mask = explainer.eval().mask(image, decision)
    other = blurred(image, 10 / 224)
    inside, outside = mask * image + (1 - mask) * other, (1 - mask) * image + mask * other
    kept = probabilities(explainer.network(inside)).gather(1, decision[:, None])
    left = probabilities(explainer.network(outside)).gather(1, decision[:, None])
    terms, generated = explainer.objective(image)
    expected = {
        "variation": weights.variation * squared_variation(mask),
        "area": weights.area * mask.mean(),
        "preserve": -kept.log().mean(),
        "destroy": weights.destroy * left.sqrt().mean(),
    }
    for name, value in expected.items():
        assert_close(terms[name], value)
    assert_close(terms["loss"], torch.stack(list(expected.values())).sum())
    assert_close(generated["similar"], inside)
    assert_close(generated["adversarial"], outside)
    assert_close(generated["logits_similar"], explainer.network(inside))
    assert_close(generated["logits_adversarial"], explainer.network(outside))


def test_variation_and_logarithm_by_hand() -> None:
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 3.0]]]])
    assert squared_variation(mask).item() == (1 + 4) / 2 + (1 + 4) / 2
    logits = torch.tensor([[2.0], [-1.0]])
    expected = probabilities(logits).log().gather(1, torch.tensor([[0], [1]]))[:, 0]
    assert_close(log_probability(logits, torch.tensor([0, 1])), expected)
    several = torch.tensor([[1.0, 2.0, 3.0]])
    assert_close(log_probability(several, torch.tensor([2])), several.log_softmax(1)[:, 2])


@pytest.mark.parametrize("conditional", [False, True])
def test_training_finds_what_the_network_looks_at(conditional: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    explainer = MaskGenerator(
        spot(),
        conditional,
        blur=0.15,
        geometry=SMALL,
        optimisation=Optimisation(learning_rate=2e-2, schedule="one_cycle"),
    )
    data = DataLoader([{"image": striped(4, k)} for k in range(50)], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(explainer, data)
    image = striped(4, 99)
    maps = explainer.explain(image)
    middle = maps[:, 6:18, 6:18].sum((1, 2)) / maps.sum((1, 2))
    assert (middle > 0.5).all()  # of a quarter of the image
    kept, left = explainer.eval()(image)
    assert (explainer.network.decide(kept) == 1).all()
    assert (explainer.network.decide(left) == 0).all()


def test_only_a_conditional_mask_explains_another_class() -> None:
    image = striped(2)
    other = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="MaskGenerator explains the classifier's own decision"):
        MaskGenerator(spot(), geometry=SMALL).explain(image, other)
    told = MaskGenerator(spot(), conditional=True, geometry=SMALL)
    assert not torch.equal(told.explain(image, other), told.explain(image, other + 1))


def test_the_mask_has_half_the_resolution() -> None:
    torch.manual_seed(0)
    explainer = MaskGenerator(spot(), geometry=SMALL).eval()
    mask = explainer.mask(torch.rand(2, 1, 25, 24), torch.tensor([1, 0]))
    assert mask.shape == (2, 1, 25, 24)
    half = nn.functional.avg_pool2d(explainer.head(explainer.unet(torch.ones(1, 1, 24, 24))), 2)
    found = explainer.mask(torch.ones(1, 1, 24, 24), torch.tensor([1]))
    expected = nn.functional.interpolate(half.sigmoid(), (24, 24), mode="bilinear")
    assert_close(found, expected)


def test_a_mask_is_not_added_to_the_image() -> None:
    with pytest.raises(ValueError, match="leave output 'delta' to the others"):
        MaskGenerator(spot(), geometry=Geometry(output="delta"))
