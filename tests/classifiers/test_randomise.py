"""Layers found in order and drawn anew, for networks of several libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from classifiers import Network, load_network
from classifiers.randomise import groups, layers, owners, randomised, save_network

IMAGE = torch.rand(2, 1, 64, 64)


def changed(network: Network, other: Network) -> set[str]:
    own, new = network.state_dict(), other.state_dict()
    return {key.rpartition(".")[0] for key in own if not own[key].equal(new[key])}


def test_layers_of_resnet18_from_the_output_to_the_input() -> None:
    network = Network("resnet18")
    found = layers(network, IMAGE)
    assert found[0] == "backbone.fc"
    assert found[-2:] == ["backbone.bn1", "backbone.conv1"]
    assert found.index("backbone.layer4.1.conv2") < found.index("backbone.layer4.0.conv1")
    assert set(found) == set(owners(network))
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_auxiliary_head_comes_first() -> None:
    network = Network("resnet18")
    network.backbone.auxiliary = torch.nn.Linear(2, 2)
    assert layers(network, IMAGE)[:2] == ["backbone.auxiliary", "backbone.fc"]


def test_groups_by_hand() -> None:
    names = list("abcdefg")
    assert groups(names, 3) == [["a", "b"], ["c", "d", "e"], ["f", "g"]]
    assert groups(names, 0) == groups(names, 99) == [[name] for name in names]
    with pytest.raises(ValueError, match="0 or more, but got -1"):
        groups(names, -1)


def test_only_the_named_layers_change_and_the_network_stays() -> None:
    network = Network("resnet18")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    names = ["backbone.fc", "backbone.layer4.1.conv2"]
    assert changed(network, randomised(network, names)) == set(names)
    assert_close(network.state_dict(), before, atol=0, rtol=0)


def test_a_layer_is_drawn_alike_whatever_others_are() -> None:
    network = Network("resnet18")
    alone = randomised(network, ["backbone.fc"], seed=3).backbone.fc.weight
    together = randomised(network, owners(network), seed=3).backbone.fc.weight
    other = randomised(network, ["backbone.fc"], seed=4).backbone.fc.weight
    assert alone.equal(together)
    assert not alone.equal(other)


def test_draws_by_hand() -> None:
    """Convolutions have He's deviation, norms are the identity, biases are zero."""
    network = Network("resnet18")
    network.backbone.bn1.running_mean.fill_(7)
    network.backbone.bn1.running_var.fill_(7)
    network.backbone.bn1.weight.data.fill_(7)
    drawn = randomised(network, owners(network)).backbone
    convolution = drawn.layer4[1].conv2.weight
    assert convolution.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert (drawn.bn1.weight == 1).all()
    assert (drawn.bn1.running_var == 1).all()
    assert not drawn.bn1.running_mean.any()
    assert not drawn.fc.bias.any()


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("tf_efficientnet_lite0", 64),
        ("densenet121", 64),
        ("mobilenet_v2", 64),
        ("vit_tiny_patch16_224", 224),
        ("swin_t", 64),
        ("convnext_tiny", 64),
    ],
)
def test_deep_networks_keep_a_signal(backbone: str, size: int) -> None:
    """Every layer drawn anew: the logits and their gradient are finite and not all the same."""
    network = Network(backbone).eval()
    image = torch.rand(2, 1, size, size)
    names = layers(network, image)
    drawn = randomised(network, names).eval()
    own = owners(network)  # fresh norms are what they are drawn to
    matrices = {n for n in names if any(p.ndim > 1 for p in own[n].parameters(recurse=False))}
    assert matrices <= changed(network, drawn) <= set(names) == set(own)
    image.requires_grad_()
    logits = drawn(image)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.flatten(1).std(1).min() > 0


def test_the_written_checkpoint_is_loaded_like_a_trained_one(tmp_path: Path) -> None:
    network = Network("resnet18", class_names=["healthy", "ill"], threshold=0.3)
    drawn = randomised(network, owners(network)).eval()
    save_network(drawn, tmp_path / "made" / "random.ckpt")
    loaded = load_network(tmp_path / "made" / "random.ckpt")
    assert_close(loaded(IMAGE), drawn(IMAGE))
    assert loaded.recipe == {**network.recipe, "weights": None}
