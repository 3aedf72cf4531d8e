"""What every method of the table must hold to, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import images, small
from torch import Tensor, nn
from torch.testing import assert_close

from classifiers.network import Network
from explainers import attribution
from explainers.attribution import regions
from explainers.base import Explainer
from explainers.views import Views

LAYER = "features.3"
METHODS: dict[str, Callable[[Network], Explainer]] = {
    "Gradient": attribution.Gradient,
    "InputXGradient": attribution.InputXGradient,
    "GuidedBackpropagation": attribution.GuidedBackpropagation,
    "SmoothGrad": lambda network: attribution.SmoothGrad(network, samples=3),
    "IntegratedGradients": lambda network: attribution.IntegratedGradients(network, steps=5),
    "SmoothGradIG": lambda network: attribution.SmoothGradIG(network, samples=3, steps=4),
    "DeepLIFT": attribution.DeepLIFT,
    "GradientSHAP": lambda network: attribution.GradientSHAP(network, samples=3),
    "Occlusion": attribution.Occlusion,
    "GradCAM": lambda network: attribution.GradCAM(network, LAYER),
    "GradCAMPlusPlus": lambda network: attribution.GradCAMPlusPlus(network, LAYER),
    "HiResCAM": lambda network: attribution.HiResCAM(network, LAYER),
    "XGradCAM": lambda network: attribution.XGradCAM(network, LAYER),
    "LayerCAM": lambda network: attribution.LayerCAM(network, LAYER),
    "ScoreCAM": lambda network: attribution.ScoreCAM(network, LAYER),
    "AblationCAM": lambda network: attribution.AblationCAM(network, LAYER),
    "EigenCAM": lambda network: attribution.EigenCAM(network, LAYER),
    "FullGrad": attribution.FullGrad,
    "XRAI": lambda network: attribution.XRAI(network, steps=5),
    "RISE": lambda network: attribution.RISE(network, masks=20),
    "BBMP": lambda network: attribution.BBMP(network, steps=5, cell=0.2, jitter=0.1),
    "ExtremalPerturbation": lambda network: attribution.ExtremalPerturbation(
        network, steps=4, areas=(0.1, 0.3), cell=0.2, sigma=0.3
    ),
    "PerceptualPerturbation": lambda network: attribution.PerceptualPerturbation(network, steps=6),
}
COLOUR = {"SmoothGrad", "SmoothGradIG", "GradientSHAP"}  # noise differs between channels
COLOUR |= {"PerceptualPerturbation", "XRAI"}  # a change, or an edge, in three channels is larger
CONTROLS = {"RandomMap", "CentredGaussian", "MeanMask", "EdgeMap", "mean_mask"}


@pytest.fixture(autouse=True)
def one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """XRAI's segmentation at one of its six scales, which is most of its time on small images."""
    monkeypatch.setattr(regions, "SCALES", (250,))


def test_every_method_is_tested() -> None:
    assert set(METHODS) == set(attribution.__all__) - CONTROLS


@pytest.mark.parametrize("name", METHODS)
def test_neighbours_in_the_batch_change_nothing(name: str) -> None:
    explainer, image, target = METHODS[name](small()), images(), torch.tensor([1, 0, 1])
    together = explainer.explain(image, target)
    alone = [explainer.explain(*one) for one in zip(image[:, None], target[:, None], strict=True)]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-3)
    assert together.shape == (3, 10, 12)
    assert (together.std((1, 2)) > 0).any()


@pytest.mark.parametrize("name", METHODS)
def test_views_work_in_inference_mode_and_the_network_stays_as_it_was(name: str) -> None:
    network, image = small().train().requires_grad_(True), images(2)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    explainer = METHODS[name](network)
    expected = explainer.explain(image, views=Views(2))
    with torch.inference_mode():
        inside = explainer.explain(image * 1, views=Views(2))
    assert_close(inside, expected)
    assert not expected.requires_grad
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in network.modules())


@pytest.mark.parametrize("name", sorted(set(METHODS) - COLOUR))
def test_a_grey_image_and_its_rgb_copy_get_the_same_map(name: str) -> None:  # noise aside
    explainer, image, target = METHODS[name](small()), images(), torch.tensor([1, 0, 1])
    grey = explainer.explain(image, target)
    colour = explainer.explain(image.repeat(1, 3, 1, 1), target)
    assert_close(colour, grey, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_black_image_gives_a_map_of_numbers(name: str) -> None:
    maps = METHODS[name](small()).explain(torch.zeros(1, 1, 10, 12))
    assert maps.isfinite().all()


@pytest.mark.parametrize(
    "method",
    [
        attribution.Gradient,
        attribution.InputXGradient,
        attribution.GuidedBackpropagation,
        attribution.SmoothGrad,
        attribution.IntegratedGradients,
        attribution.SmoothGradIG,
        attribution.DeepLIFT,
        attribution.GradientSHAP,
        attribution.Occlusion,
        attribution.GradCAM,
        attribution.HiResCAM,
        attribution.AblationCAM,
    ],
)
def test_positive_and_negative_attributions_add_up_to_the_absolute(
    method: Callable[..., Explainer],
) -> None:
    network, image, target = small(3), images(), torch.tensor([2, 0, 1])
    options: dict[str, object] = {"steps": 3} if "IG" in method.__name__ else {}
    if "CAM" in method.__name__:
        options["layer"] = "features.1"
    maps = [
        method(network, sign=sign, **options).explain(image, target)
        for sign in ("positive", "negative", "absolute")
    ]
    positive, negative, absolute = maps
    assert_close(positive + negative, absolute, atol=1e-6, rtol=1e-4)
    assert (positive > 0).any()
    assert (negative > 0).any()
    assert min(positive.min(), negative.min()) >= 0


class Memory:
    """A network's forward that has room for a few images only."""

    def __init__(self, network: Network, room: int) -> None:
        self.forward, self.room, self.refused = network.backbone.forward, room, 0

    def __call__(self, image: Tensor) -> Tensor:
        if len(image) > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        result: Tensor = self.forward(image)
        return result


@pytest.mark.parametrize(
    "name",
    ["SmoothGrad", "IntegratedGradients", "SmoothGradIG", "Occlusion", "RISE", "ScoreCAM", "XRAI"],
)
def test_out_of_memory_halves_the_batch_and_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, image, target = small(), images(), torch.tensor([1, 0, 1])
    expected = METHODS[name](network).saliency(image, target)
    memory = Memory(network, 4)
    monkeypatch.setattr(network.backbone, "forward", memory)
    with pytest.warns(UserWarning, match=r"out of memory: going on with batches of \d+\."):
        found = METHODS[name](network).saliency(image, target)
    assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert memory.refused > 0
    memory.room = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out"):
        METHODS[name](network).saliency(image, target)


@pytest.mark.parametrize("name", ["GuidedBackpropagation", "DeepLIFT", "FullGrad", "GradCAM"])
@pytest.mark.parametrize(("backbone", "side"), [("googlenet", 48), ("inception_v3", 107)])
def test_inceptions_in_the_methods_that_follow_layers(name: str, backbone: str, side: int) -> None:
    """Branches that are joined, and in Inception v3 an input of another scale."""
    torch.manual_seed(0)
    network, build = Network(backbone), getattr(attribution, name)
    nn.init.ones_(network.backbone.get_parameter("fc.weight"))  # drawn ones may speak against it
    maps = build(network).explain(torch.rand(2, 1, side, side), torch.ones(2, dtype=torch.int64))
    assert maps.isfinite().all()
    assert (maps.std((1, 2)) > 0).all()
