"""One interface for every explainer: an image in, one saliency map out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from classifiers.network import Network
from explainers.views import Views, average_over_views, smooth


class Explainer(ABC):
    """Explains the decision of ``network``; subclasses give ``saliency``.

    ``explain`` decides the target once, averages over views, smooths, and leaves the network as
    it was found: training mode, ``requires_grad``, gradients, hooks and buffers.
    """

    network: Network
    reads_target = True  # False where the map is the same for every class

    @abstractmethod
    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """One map per image for its target class, larger = more relevant; called for views too.

        Gradients are off when it is called; a method that needs them opens its own scope.
        """

    def check_target(  # noqa: B027  not abstract: most explainers take any target
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> None:
        """Raise ValueError where this explainer cannot explain ``target``; any class by default."""

    def own_target(self, image: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
        """The network's decisions, or zeros, for nothing, where the map does not depend on them."""
        if self.reads_target:
            return self.network.decide(image)
        return torch.zeros(len(image), dtype=torch.int64, device=image.device)

    def explain(
        self,
        image: Float[Tensor, "b c h w"],
        target: Int64[Tensor, " b"] | None = None,
        views: Views | None = None,
        smoothing: float = 0.0,
    ) -> Float[Tensor, "b h w"]:
        """Saliency of each image.

        Args:
            image: In [0, 1].
            target: Class to explain; the network's own decision by default.
            views: Geometric views to average over (Eq. 11); the plain map by default.
            smoothing: Sigma of a Gaussian over the map, as a share of the image side; 0 is off.

        Returns:
            Map, larger = more relevant; raw values, any range.

        Raises:
            ValueError: If the explainer cannot explain a given target.
        """
        with untouched(self.network), torch.no_grad():
            if target is None:
                target = self.own_target(image)
            else:
                self.check_target(image, target)
            maps = average_over_views(self.saliency, image, target, views)
            return smooth(maps, smoothing)

    def attribute(
        self, inputs: Float[Tensor, "b c h w"], target: int | Int64[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """The plain map by Captum's name: one channel, as its layer methods give.

        Args:
            inputs: Images in [0, 1].
            target: Class of every image, or of each; the network's own decision by default.
        """
        if isinstance(target, int):
            target = torch.full((len(inputs),), target, device=inputs.device)
        return self.explain(inputs, target)[:, None]


def quantus_function(
    build: Callable[[Network], Explainer],
) -> Callable[..., Float32[np.ndarray, "b 1 h w"]]:
    """What Quantus calls as ``explain_func``.

    Args:
        build: An explainer of the classifier that Quantus hands over, changed in its randomisation
            checks: `GradCAM`, or ``lambda network: explainer`` for a learned one with its own.

    Returns:
        Function of model, inputs (b, c, h, w) and targets (b), arrays; other keywords are not used.
        A learned explainer takes no targets but the network's decisions.
    """

    def explained(
        model: Network, inputs: NDArray[Any], targets: NDArray[Any], **_: object
    ) -> Float32[np.ndarray, "b 1 h w"]:
        device = model.mean.device
        images = torch.as_tensor(inputs, dtype=torch.float32, device=device)
        classes = torch.as_tensor(targets, dtype=torch.int64, device=device)
        maps: NDArray[np.float32] = build(model).attribute(images, classes).float().cpu().numpy()
        return maps

    return explained


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; the caller's modes and flags again outside."""
    training = [module for module in network.modules() if module.training]
    required = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        if training:  # what is in eval mode already is spared: setting a large network takes long
            network.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in required:
            parameter.requires_grad_(True)
