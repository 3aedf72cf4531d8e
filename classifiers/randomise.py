"""Classifiers whose layers are drawn anew, for sanity checks of explanations."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network
from classifiers.whole import whole


def layers(network: Network, image: Float[Tensor, "b c h w"]) -> list[str]:
    """Names of the modules that own weights, from the output to the input.

    In the order in which the network calls them; those that it does not call (auxiliary heads)
    come first.

    Args:
        network: Any torchvision, timm or own backbone.
        image: One or more images in [0, 1].
    """
    names = {module: name for name, module in owners(network).items()}
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.setdefault(names[module]))
        for module in names
    ]
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return [name for name in names.values() if name not in called] + list(reversed(called))


def owners(network: Network) -> dict[str, nn.Module]:
    """Modules that own weights, by name."""
    modules = dict(network.named_modules()).items()
    return {name: module for name, module in modules if list(module.parameters(recurse=False))}


def groups(names: Sequence[str], count: int) -> list[list[str]]:
    """The layers in at most ``count`` groups of nearly equal size, in their order; 0: each alone.

    Raises:
        ValueError: If the count is negative.
    """
    if count < 0:
        raise ValueError(f"the number of groups must be 0 or more, but got {count}.")
    count = min(count or len(names), len(names))
    bounds = [round(k * len(names) / count) for k in range(count + 1)]
    return [list(names[a:b]) for a, b in pairwise(bounds)]


def randomised(network: Network, names: Iterable[str], seed: int = 0) -> Network:
    """A copy of the network with the weights of the named layers drawn anew.

    Convolutions and linear layers by He et al. 2015, which keeps the signal's size through any
    depth, norms as the identity without statistics, other weights (tokens, positions, scales)
    normal with deviation 0.02. The draw of a layer does not depend on which others are drawn.
    """
    copied = deepcopy(network)
    for name in names:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        redraw(copied.get_submodule(name), generator)
    return copied


@torch.no_grad()
def redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the module's own weights anew; see `randomised`."""
    norm = not any(p.ndim > 1 for p in module.parameters(recurse=False))
    for name, weight in module.named_parameters(recurse=False):
        drawn = torch.empty(weight.shape)  # on the CPU, where the generator is
        if "bias" in name:
            nn.init.zeros_(drawn)
        elif norm and name == "weight":
            nn.init.ones_(drawn)
        elif weight.ndim > 1 and "weight" in name:
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
        else:
            nn.init.normal_(drawn, std=0.02, generator=generator)
        weight.copy_(drawn)
    getattr(module, "reset_running_stats", lambda: None)()


def save_network(network: Network, path: Path) -> None:
    """Write a checkpoint that `load_network` and ``train.py`` take like a trained classifier's."""
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    with whole(path) as file:
        torch.save({"network": dict(network.recipe), "state_dict": state}, file)
