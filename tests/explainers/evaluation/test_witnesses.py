from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.testing import assert_close

from classifiers.network import Network
from explainers.attribution import Gradient
from explainers.evaluation.witnesses import WitnessAgreement, highest
from explainers.learned import Geometry, Single
from explainers.views import Views

VIEWS = Views(count=2, vertical_flip=0.0)


def batch(seed: int, count: int) -> dict[str, Any]:
    """Images of which none has a mask."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 1, 24, 24, generator=generator),
        "has_mask": torch.zeros(count, dtype=torch.bool),
        "id": [f"{seed} {k}" for k in range(count)],
    }


class Counted(Gradient):
    """Counts the images that it explains."""

    images = 0

    def explain(self, image: Tensor, *rest: Any, **options: Any) -> Tensor:
        Counted.images += len(image)
        return super().explain(image, *rest, **options)


def explainer() -> Single:
    torch.manual_seed(0)
    return Single(Network("test_resnet"), 1, geometry=Geometry(widths=(4, 6))).eval()


def scores(callback: WitnessAgreement, module: LightningModule, *seen: dict[str, Any]) -> Any:
    callback.reset(module)
    for one in seen:
        callback.add(module, {}, one)
    return callback.finish(Trainer(logger=False, accelerator="cpu"), module, "val")


def test_the_highest_values_by_hand() -> None:
    saliency = torch.arange(20.0).view(1, 4, 5)
    assert highest(saliency, 0.1).flatten().nonzero().flatten().tolist() == [18, 19]
    tied = torch.tensor([[[2.0, 3.0], [3.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert highest(tied, 0.25).tolist() == [[[False, True], [True, False]], [[False] * 2] * 2]
    assert highest(tied, 0.01).sum() == 2


def test_the_score_is_the_mean_average_precision_against_the_witness() -> None:
    module, seen = explainer(), [batch(0, 3), batch(1, 2)]
    callback = WitnessAgreement({"Gradient": Gradient}, VIEWS, smoothing=0.05, share=0.1)
    found = scores(callback, module, *seen)
    image = torch.cat([one["image"] for one in seen])
    maps, shown = (
        way.explain(image, views=VIEWS, smoothing=0.05).flatten(1)
        for way in (module, Gradient(module.network))
    )
    wanted = [
        average_precision_score((theirs >= theirs.quantile(0.9)).numpy(), ours.numpy())
        for ours, theirs in zip(maps, shown, strict=True)
    ]
    assert list(found) == ["witness/Gradient"]
    assert_close(float(found["witness/Gradient"]), sum(wanted) / 5, atol=1e-6, rtol=1e-6)


def test_a_witness_is_asked_once_for_each_image_and_agrees_with_itself() -> None:
    Counted.images = 0
    callback = WitnessAgreement({"it": Counted}, VIEWS, smoothing=0.05)
    module = explainer()
    first = scores(callback, module, batch(0, 3), batch(1, 2))
    assert_close(scores(callback, module, batch(1, 2), batch(0, 3)), first)
    assert Counted.images == 5
    itself = WitnessAgreement({"it": lambda network: module}, VIEWS, smoothing=0.05)
    assert_close(float(scores(itself, module, batch(0, 3))["witness/it"]), 1.0)


def test_an_image_with_a_constant_witness_does_not_count() -> None:
    class Half(Gradient):
        def explain(self, image: Tensor, *rest: Any, **options: Any) -> Tensor:
            found = super().explain(image, *rest, **options)
            return torch.cat([found[:1], torch.ones_like(found[1:])])

    module, one = explainer(), batch(0, 1)
    halves = WitnessAgreement({"it": Half}, VIEWS, smoothing=0.05)
    whole = WitnessAgreement({"it": Gradient}, VIEWS, smoothing=0.05)
    both = {**batch(0, 3), "image": torch.cat([one["image"], batch(1, 2)["image"]])}
    assert_close(scores(halves, module, both), scores(whole, module, one))


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="witnesses must name a method"):
        WitnessAgreement({})
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\), but got 0"):
        WitnessAgreement({"Gradient": Gradient}, share=0)
