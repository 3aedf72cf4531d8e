"""What a backbone's layers give, as maps: found by name, or looked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from classifiers.network import Network

PREFIX_TOKENS = 16  # more than class, distillation and register tokens of any backbone known here


def channels_first(output: object, layer: str, image: torch.Size) -> Float[Tensor, "b k h w"]:
    """A layer's output as a map (b, channels, height, width).

    Tokens (b, tokens, channels) are laid out on a grid of the image's proportions; what comes
    before them (class token, registers) is left out.

    Raises:
        ValueError: If the output is no map.
    """
    shape = output.shape if isinstance(output, Tensor) else None
    if isinstance(output, Tensor) and output.ndim == 4:
        last = not is_map(output.shape, image) and is_map(output.permute(0, 3, 1, 2).shape, image)
        return output.permute(0, 3, 1, 2) if last else output
    if isinstance(output, Tensor) and output.ndim == 3:
        for count in range(output.shape[1], max(output.shape[1] - PREFIX_TOKENS, 1), -1):
            height = round((count * image[2] / image[3]) ** 0.5)
            width = count // max(height, 1)
            if height * width == count and height * image[3] == width * image[2]:
                return output[:, -count:].mT.reshape(len(output), -1, height, width)
    raise ValueError(
        "class activation maps need a layer with output (b, channels, height, width), or tokens on "
        f"a grid, but {layer!r} gave {shape and tuple(shape)}; name another layer."
    )


def raw_output(network: Network, layer: str, image: Float[Tensor, "b c h w"]) -> Tensor:
    """Output of a layer; what is left of it where the network overwrites it in place."""
    return raw_outputs(network, [layer], image)[0]


def raw_outputs(
    network: Network, layers: Sequence[str], image: Float[Tensor, "b c h w"]
) -> list[Tensor]:
    """Outputs of several layers in one pass, each of its last call, as `raw_output`."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        found[name] = output

    modules = {name: network.backbone.get_submodule(name) for name in layers}
    handles = [
        module.register_forward_hook(partial(keep, name)) for name, module in modules.items()
    ]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name in layers]


def is_map(shape: torch.Size, image: torch.Size) -> bool:
    """Whether (b, channels, height, width) has several positions and the image's proportions."""
    height, width = shape[2:]
    return height * width > 1 and abs(height * image[3] / image[2] - width) <= 1


def map_outputs(network: Network, image: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Outputs of the backbone's modules in the order of their calls, as far as they are maps.

    These are outputs with several positions, and any of a convolution wider than one pixel. The
    tensors are kept, which keeps their ids apart: a container's output is its last child's.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str, module: nn.Module, _: object, output: object) -> None:
        wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        if isinstance(output, Tensor) and output.ndim > 2 and (wide or output[0, 0].numel() > 1):
            outputs.append((name, module, output))

    modules = [(name, module) for name, module in network.backbone.named_modules() if name]
    handles = [module.register_forward_hook(partial(record, name)) for name, module in modules]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
