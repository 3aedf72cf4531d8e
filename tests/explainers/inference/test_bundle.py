"""The bundle says what the classifier and the explainer say."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from classifiers.network import Network
from explainers.inference import Answer, Bundle
from explainers.inference.export import exported, write_onnx
from explainers.learned import Adversarial, Distilled, Duo, Geometry, LearnedExplainer, Single
from explainers.views import Views

SMALL = Geometry(widths=(4, 6))


def student(network: Network, geometry: Geometry, features: bool = False) -> Distilled:
    teacher = Single(network, geometry=geometry)
    explainer = Distilled(teacher, widths=(4, 6), reduction=2, features=features)
    explainer.scale.fill_(0.5)
    return explainer


reader = partial(student, features=True)


@pytest.mark.parametrize("build", [Single, Duo, Adversarial, student, reader])
@pytest.mark.parametrize("views", [None, Views(0), Views(5, rotation=40.0, seed=3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_its_answer_is_that_of_explain(
    build: Callable[..., LearnedExplainer], views: Views | None, smoothing: float
) -> None:
    torch.manual_seed(0)
    network = Network("test_resnet", threshold=0.4).eval()
    explainer = build(network, geometry=SMALL).eval()
    image = torch.rand(3, 1, 24, 20)
    with torch.no_grad():
        answer = Answer(*Bundle(network, explainer, (24, 20), views, smoothing)(image))
        similar, adversarial = explainer(image)
    assert_close(answer.map, explainer.explain(image, views=views, smoothing=smoothing))
    assert_close(answer.decision, network.decide(image))
    assert_close(answer.similar, similar)
    assert_close(answer.adversarial, adversarial)
    assert_close(answer.probability[:, 1], network(image).sigmoid()[:, 0])


def test_a_student_that_reads_the_classifier_is_exported() -> None:
    torch.manual_seed(0)
    explainer, image = reader(Network("test_resnet").eval(), SMALL), torch.rand(2, 1, 32, 32)
    bundle = Bundle(explainer.network, explainer, (32, 32), Views(2))
    found = exported(bundle, image).module()(torch.cat([image, image.flip(3)]))
    assert_close(found, bundle(torch.cat([image, image.flip(3)])))


@pytest.mark.parametrize("features", [False, True])
def test_the_exported_file_asks_the_classifier_once(features: bool, tmp_path: Path) -> None:
    """The features that the student reads come from the pass that the decision follows from."""
    explainer = student(Network("test_resnet").eval(), SMALL, features)
    bundle = Bundle(explainer.network, explainer, (32, 32))
    write_onnx(bundle, torch.rand(1, 1, 32, 32), tmp_path / "model.onnx")
    found = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    layers = [one for one in explainer.modules() if isinstance(one, nn.Conv2d)]
    assert found.count("Conv") == len(layers)


@pytest.mark.parametrize("build", [Single, student, reader])
def test_an_answer_asks_the_classifier_once(build: Callable[..., LearnedExplainer]) -> None:
    explainer, asked = build(Network("test_resnet").eval(), geometry=SMALL), list[torch.Size]()
    explainer.network.register_forward_hook(lambda _, inputs, __: asked.append(inputs[0].shape))
    bundle, image = Bundle(explainer.network, explainer, (32, 32)), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        bundle.explained(image)
        bundle(image)
    assert asked == [image.shape] * 2


def test_an_export_leaves_no_second_class_of_the_name() -> None:
    explainer = Single(Network("test_resnet"), geometry=SMALL).eval()
    gc.disable()
    try:
        exported(Bundle(explainer.network, explainer, (16, 16)), torch.rand(1, 1, 16, 16))
        assert Single.__subclasses__() == []  # --model Single would be ambiguous
    finally:
        gc.enable()
