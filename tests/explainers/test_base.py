from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from classifiers.network import Network
from explainers.base import Explainer, quantus_function, untouched
from explainers.views import Views, average_over_views, smooth


class Recorder(Explainer):
    """Explains by the image's gradient and notes how it was called."""

    def __init__(self, network: Network, error: Exception | None = None) -> None:
        self.network, self.error = network, error
        self.targets: list[Tensor] = []
        self.modes: set[bool] = set()
        self.flags: set[bool] = set()
        self.gradients: set[bool] = set()

    def saliency(self, image: Tensor, target: Tensor) -> Tensor:
        self.targets.append(target)
        self.modes |= {module.training for module in self.network.modules()}
        self.flags |= {weight.requires_grad for weight in self.network.parameters()}
        self.gradients.add(torch.is_grad_enabled())
        if self.error is not None:
            raise self.error
        with torch.enable_grad():
            image = image.clone().requires_grad_(True)
            logits = self.network(image)
            (gradient,) = torch.autograd.grad(logits[:, 0].sum(), image)
        return gradient.abs().mean(1) * (1 + target)[:, None, None]


class OnlyOne(Recorder):
    """Explains class 1 alone."""

    def check_target(self, image: Tensor, target: Tensor) -> None:
        if (target != 1).any():
            raise ValueError("only class 1 can be explained.")


def network(num_logits: int = 1) -> Network:
    torch.manual_seed(0)
    return Network("test_resnet", num_logits)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that an explainer must leave as it was."""
    return {
        "modes": [part.training for part in module.modules()],
        "flags": [weight.requires_grad for weight in module.parameters()],
        "gradients": [None if w.grad is None else w.grad.clone() for w in module.parameters()],
        "hooks": [
            (len(part._forward_hooks), len(part._backward_hooks), len(part._forward_pre_hooks))
            for part in module.modules()
        ],
        "values": {name: value.clone() for name, value in module.state_dict().items()},
    }


def used_network() -> Network:
    """A network in a mixed state: training but for one part, one frozen weight, gradients."""
    used = network()
    used(images()).sum().backward()
    used.train()
    next(iter(used.backbone.children())).eval()
    next(used.parameters()).requires_grad_(False)
    return used


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for key in ("modes", "flags", "hooks"):
        assert first[key] == second[key]
    for one, two in zip(first["gradients"], second["gradients"], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert all(torch.equal(value, second["values"][k]) for k, value in first["values"].items())


def test_explain_leaves_the_network_as_it_was() -> None:
    used = used_network()
    before = state(used)
    assert {True, False} == set(before["modes"]) == set(before["flags"])
    explainer = Recorder(used)
    explainer.explain(images(), views=Views(2), smoothing=0.05)
    same(before, state(used))
    assert explainer.modes == {False}
    assert explainer.flags == {False}
    assert explainer.gradients == {False}


def test_explain_leaves_the_network_as_it_was_after_an_exception() -> None:
    used = used_network()
    before = state(used)
    with pytest.raises(RuntimeError, match="broken"):
        Recorder(used, RuntimeError("broken")).explain(images())
    same(before, state(used))
    assert torch.is_grad_enabled()


def test_untouched_restores_after_its_body() -> None:
    used = used_network()
    before = state(used)
    with untouched(used):
        assert not any(part.training for part in used.modules())
        assert not any(weight.requires_grad for weight in used.parameters())
    same(before, state(used))


def test_explain_gives_one_map_per_image_without_gradient() -> None:
    maps = Recorder(network()).explain(images().requires_grad_(True))
    assert maps.shape == (3, 32, 32)
    assert not maps.requires_grad


def test_explain_works_inside_inference_mode() -> None:
    class Plain(Recorder):
        def saliency(self, image: Tensor, target: Tensor) -> Tensor:
            logits: Tensor = self.network(image)
            return image.mean(1) * logits[:, :, None]

    explainer = Plain(network())
    with torch.inference_mode():
        maps = explainer.explain(images())
    assert_close(maps, explainer.explain(images()))


def test_the_target_is_the_decision_on_the_image_itself() -> None:
    explainer = Recorder(network(3))
    image = images(4)
    views = Views(5, work_batch=6)
    explainer.explain(image, views=views)
    decision = explainer.network.eval().decide(image)
    seen = torch.cat(explainer.targets)[:20]
    assert torch.equal(seen, decision.repeat_interleave(5))


def test_what_does_not_read_the_target_spares_the_network() -> None:
    explainer, calls = Recorder(network()), list[int]()
    explainer.network.register_forward_pre_hook(lambda *_: calls.append(1))
    explainer.explain(images())
    assert len(calls) == 2  # the decision, and the explainer's own
    explainer.explain(images(), torch.tensor([1, 0, 1]))
    assert len(calls) == 3
    explainer.reads_target = False
    explainer.explain(images())
    assert len(calls) == 4


def test_a_given_target_is_passed_on_and_checked() -> None:
    target = torch.tensor([1, 0, 1])
    explainer = Recorder(network())
    explainer.explain(images(), target)
    assert torch.equal(explainer.targets[0], target)
    picky = OnlyOne(network())
    picky.explain(images(), torch.ones(3, dtype=torch.long), Views(2))
    with pytest.raises(ValueError, match="only class 1"):
        picky.explain(images(), target)


def test_views_come_before_smoothing() -> None:
    explainer, image, views = Recorder(network()), images(), Views(3)
    target = torch.tensor([0, 1, 1])
    found = explainer.explain(image, target, views, 0.1)
    with untouched(explainer.network):
        averaged = average_over_views(explainer.saliency, image, target, views)
    assert_close(found, smooth(averaged, 0.1))
    assert not torch.allclose(found, explainer.explain(image, target))


def test_an_explainer_must_give_saliency() -> None:
    class Nothing(Explainer):
        pass

    with pytest.raises(TypeError, match="saliency"):
        Nothing()  # type: ignore[abstract]


def test_attribute_is_the_plain_map_of_one_class_or_of_each() -> None:
    explainer = Recorder(network(2))
    target = torch.tensor([1, 0, 1])
    assert_close(explainer.attribute(images(), target)[:, 0], explainer.explain(images(), target))
    ones = torch.ones(3, dtype=torch.int64)
    assert_close(explainer.attribute(images(), 1)[:, 0], explainer.explain(images(), ones))


def test_a_quantus_function_explains_the_network_that_it_is_given() -> None:
    call = quantus_function(Recorder)
    first, second = network(2), network(2)
    torch.nn.init.normal_(next(second.backbone.parameters()))
    targets = np.array([1, 0, 1])
    for one in (first, second):
        found = call(model=one, inputs=images().numpy(), targets=targets, device="cpu")
        expected = Recorder(one).explain(images(), torch.from_numpy(targets))
        assert_close(torch.from_numpy(found)[:, 0], expected)
    assert not np.allclose(found, call(first, images().numpy(), targets))
