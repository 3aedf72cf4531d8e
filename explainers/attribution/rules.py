"""Gradients with another rule at the activations: guided backpropagation, DeepLIFT.

The rules are put in where the network calls an activation, whether as a module or as a function, in
place or not, reused or not: hooks on modules (captum's way) refuse or miss those cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from classifiers.network import Network
from explainers.attribution.scores import ClassScores, Sign, gradients_on, signed
from explainers.base import Explainer

RELUS = ("relu", "relu6")
OTHERS = ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "selu",
    "sigmoid", "silu", "softplus", "tanh")  # fmt: skip
POOLING = ("max_pool2d", "adaptive_max_pool2d")
EPSILON = 1e-6  # of a difference from the baseline, below which the derivative stands for the ratio
TOLERANCE = 0.01  # share of all attribution that may be missing without a warning

Function = Callable[..., Any]
Rule = Callable[[Tensor, Function], Tensor]


class GuidedBackpropagation(Explainer):
    """Gradient at the image that passes every ReLU (and ReLU6) only where it is positive.

    Args:
        network: Classifier to explain; without a ReLU the map is the plain gradient's, with a
            warning.
        sign: Which attributions count, see `signed`.

    Source: Springenberg et al. 2015, arXiv:1412.6806, Sec. 3.4.
    """

    def __init__(self, network: Network, sign: Sign = "absolute") -> None:
        self.network, self.sign = network, sign
        self.scores = ClassScores(network)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Guided gradient, summed over channels."""
        with gradients_on(image, target) as (free, wanted):
            with AtCalls(dict.fromkeys(RELUS, _Guided.apply)) as rule:
                scores = self.scores(free.requires_grad_())
            if not rule.count:
                warnings.warn(
                    "the network calls no ReLU: guided backpropagation is its plain gradient.",
                    stacklevel=2,
                )
            slope = torch.autograd.grad(scores.gather(1, wanted[:, None]).sum(), free)[0]
        return signed(slope, self.sign)


class DeepLIFT(Explainer):
    """Difference of the target's score from a black image's, shared out by the rescale rule.

    Where the attributions do not add up to that difference a warning says by how much: products of
    activations (attention, squeeze-and-excitation) and layer normalisation are not shared out.

    Args:
        network: Classifier to explain.
        sign: Which attributions count, see `signed`.

    Source: Shrikumar et al. 2017, arXiv:1704.02685, Sec. 3.5.1. Of a max-pooled
    pair the place of the larger maximum gets the difference; captum 0.9, with the same rule, does
    not add up there.
    """

    def __init__(self, network: Network, sign: Sign = "absolute") -> None:
        self.network, self.sign = network, sign
        self.scores = ClassScores(network)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Contribution of each pixel, summed over channels."""
        rules = dict.fromkeys(RELUS + OTHERS, _Rescaled.apply)
        with gradients_on(image, target) as (free, wanted):
            both = torch.cat([free, torch.zeros_like(free)]).requires_grad_()
            with AtCalls(rules | dict.fromkeys(POOLING, _RescaledPooling.apply)):
                scores = self.scores(both).gather(1, wanted.repeat(2)[:, None])[:, 0]
            own, baseline = scores.chunk(2)
            attribution = torch.autograd.grad(own.sum(), both)[0][: len(free)] * free
        warn_if_incomplete(attribution.detach(), (own - baseline).detach())
        return signed(attribution, self.sign)


class AtCalls(TorchFunctionMode):
    """Calls a rule in the place of functions of `torch.nn.functional`, by name, in place or not.

    Args:
        rules: Gets the input and the function, which gives a new tensor.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules, self.count = rules, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The rule's result, or that of the function itself where it has no rule."""
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "").removesuffix("_")
        if name == "hardtanh" and options.get("min_val") == 0:
            name = "relu6"  # which torch computes so
        if name not in self.rules:
            return func(*args, **options)
        self.count += 1
        function = getattr(F, "hardtanh" if name == "relu6" and "min_val" in options else name)
        options.pop("inplace", None)
        others = [arg for arg in args[1:] if not isinstance(arg, bool)]  # a bool is "in place"
        return self.rules[name](
            args[0], lambda value, **more: function(value, *others, **options | more)
        )


class _Guided(torch.autograd.Function):
    """An activation whose backward pass lets only positive gradients through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Function) -> Tensor:
        ctx.save_for_backward(value)
        ctx.function = function
        output: Tensor = function(value)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return derivative(ctx.function, value) * gradients[0].clamp(min=0), None


class _Rescaled(torch.autograd.Function):
    """An activation of images and their baselines, with the ratio of differences as its slope."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Function) -> Tensor:
        output: Tensor = function(value)
        ctx.save_for_backward(value, output)
        ctx.function = function
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        value, output = ctx.saved_tensors
        inside, outside = (halves[0] - halves[1] for halves in (value.chunk(2), output.chunk(2)))
        small = inside.abs() < EPSILON
        slope = derivative(ctx.function, value).chunk(2)[0]
        ratio = torch.where(small, slope, outside / inside.where(~small, 1))
        return torch.cat([ratio, ratio]) * gradients[0], None


class _RescaledPooling(torch.autograd.Function):
    """Max-pooling of images and their baselines: the larger maximum's place gets the difference."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Function) -> Tensor:
        output: Tensor
        output, place = function(value, return_indices=True)
        ctx.save_for_backward(value, output, place)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        value, output, place = ctx.saved_tensors
        (own, baseline), (high, low) = value.chunk(2), output.chunk(2)
        first, second = place.chunk(2)
        where = torch.where(high >= low, first, second).flatten(2)
        shared = (gradients[0].chunk(2)[0] * (high - low)).flatten(2)
        contribution = torch.zeros_like(own).flatten(2).scatter_add(2, where, shared)
        difference = own - baseline
        small = difference.abs() < EPSILON
        multiplier = contribution.view_as(own) / difference.where(~small, torch.inf)
        return torch.cat([multiplier, torch.zeros_like(own)]), None


def derivative(function: Function, value: Tensor) -> Tensor:
    """Slope of an elementwise function at each value."""
    with torch.enable_grad():
        free = value.detach().requires_grad_()
        slope: Tensor = torch.autograd.grad(function(free).sum(), free)[0]
    return slope


def warn_if_incomplete(
    attribution: Float[Tensor, "b c h w"], difference: Float[Tensor, " b"]
) -> None:
    """Warn where attributions do not add up to the score's difference from the baseline."""
    flat = attribution.flatten(1)
    gap = (flat.sum(1) - difference).abs()
    share = float((gap / (flat.abs().sum(1) + difference.abs()).clamp(min=1e-12)).max())
    if share > TOLERANCE:
        warnings.warn(
            f"attributions miss the score's difference from the baseline by up to {share:.1%} of "
            "all attribution: this network has parts that the method's rule does not cover.",
            stacklevel=3,
        )
