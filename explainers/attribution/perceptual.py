"""Perceptual perturbation: the image nearest in features that the network decides otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from classifiers.network import Network, paired_logits
from explainers.attribution.rules import OTHERS, RELUS
from explainers.attribution.scores import at_least_one, gradients_on
from explainers.base import Explainer
from explainers.batches import in_batches
from explainers.views import blurred

Losses = Callable[[Tensor], Float[Tensor, " b"]]


class PerceptualPerturbation(Explainer):
    """Change of the image, small in pixels and in features, that moves the target's margin.

    It minimises, by L-BFGS with a state of its own for each image, feature_weight times the mean
    squared change of features, plus that of the pixels, plus (margin - v)^2, where the margin is
    the target's logit minus the largest other. Features are the first activations of each
    resolution.

    Args:
        network: Classifier to explain.
        steps: Most steps of L-BFGS.
        margin: v, logits; below 0 the target loses.
        feature_weight: Of the features' change.
        blur: Sigma over the map, share of the image side.
        work_batch: Most images at once.

    Raises:
        ValueError: If ``steps`` or ``work_batch`` is below 1.

    Source: Elliott et al. 2019, "Perceptual perturbations". Means for its squared differences and
    backtracking in its L-BFGS are ours; with means, its weight of 1e4 for the features leaves the
    decisions as they are, while 1 turns them over (benchmarks/LOG.md).
    """

    def __init__(
        self,
        network: Network,
        steps: int = 200,
        margin: float = -2.0,
        feature_weight: float = 1.0,
        blur: float = 2 / 224,
        work_batch: int = 32,
    ) -> None:
        self.network, self.margin, self.feature_weight = network, margin, feature_weight
        self.blur = blur
        self.steps = at_least_one("steps", steps)
        self.work_batch = at_least_one("work_batch", work_batch)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Square root of the change's mean square over channels, blurred."""
        with gradients_on(image, target) as (free, wanted):
            changed = in_batches(self._perturb, free, wanted, self.work_batch)
        change = (changed - image).square().mean(1, keepdim=True).sqrt()
        return blurred(change, self.blur)[:, 0]

    def _perturb(self, image: Tensor, target: Tensor) -> Tensor:
        """The perturbed image (b, c, h, w), values of any size."""
        with torch.no_grad(), _Features() as original:
            self.network(image)

        def losses(changed: Tensor) -> Tensor:
            with _Features() as features:
                logits = paired_logits(self.network(changed), self.network.threshold)
            loss = (changed - image).square().flatten(1).mean(1)
            for new, old in zip(features.found, original.found, strict=True):
                loss = loss + self.feature_weight * (new - old).square().flatten(1).mean(1)
            return loss + (lead(logits, target) - self.margin).square()

        return lbfgs(losses, image, self.steps)


def lead(logits: Float[Tensor, "b k"], target: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The target's logit minus the largest other one."""
    wanted = one_hot(target, logits.shape[1]).bool()
    return logits[wanted] - logits.masked_fill(wanted, -torch.inf).amax(1)


class _Features(TorchFunctionMode):
    """Keeps the first activation's output at each resolution of what is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").removesuffix("_")
        if name in RELUS + OTHERS and output.ndim == 4:
            sizes = {tuple(one.shape[2:]) for one in self.found}
            if tuple(output.shape[2:]) not in sizes:
                self.found.append(output)
        return output


def lbfgs(
    losses: Losses, start: Float[Tensor, "b ..."], steps: int, history: int = 10
) -> Float[Tensor, "b ..."]:
    """Minimise a loss for each image on its own, all together, by L-BFGS with backtracking.

    Args:
        losses: One loss for each image, each of its own values alone.
        start: Values to begin with.
        steps: Most of them.
        history: Pairs of changes that the curvature is read off.

    Source: Nocedal and Wright 2006, Algorithms 7.4 and 3.1.
    """
    shape = start.shape

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
        free = point.detach().requires_grad_()
        value = losses(free.view(shape))
        return value.detach(), torch.autograd.grad(value.sum(), free)[0]

    point = start.detach().flatten(1)
    value, slope = evaluate(point)
    pairs: list[tuple[Tensor, Tensor]] = []
    going = torch.ones_like(value, dtype=torch.bool)[:, None]  # until no step helps
    for _ in range(steps):
        direction = -two_loops(slope, pairs)
        direction = direction.where(dot(direction, slope) < 0, -slope)
        if not pairs:
            direction = direction / slope.abs().sum(1, keepdim=True).clamp(min=1)
        descent, step = dot(direction, slope), torch.ones_like(slope[:, :1])
        new, new_value, new_slope = point, value, slope
        left = going
        for _ in range(10):
            tried = point + step * direction
            tried_value, tried_slope = evaluate(tried)
            good = left & (tried_value[:, None] <= value[:, None] + 1e-4 * step * descent)
            new, new_slope = tried.where(good, new), tried_slope.where(good, new_slope)
            new_value = tried_value.where(good[:, 0], new_value)
            left = left & ~good
            if not left.any():
                break
            step = step / 2
        going = going & ~left & (new != point).any(1, keepdim=True)
        if not going.any():
            break
        pairs = [*pairs[1 - history :], (new - point, new_slope - slope)]
        point, value, slope = new, new_value, new_slope
    return point.view(shape)


def two_loops(slope: Float[Tensor, "b n"], pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Slope times the inverse curvature; pairs of a row without positive curvature do not count."""
    usable = [(s, y, dot(s, y), dot(s, y) > 1e-12) for s, y in pairs]
    result, shares = slope, []
    for s, y, product, good in reversed(usable):
        share = torch.where(good, dot(s, result) / product.where(good, 1), 0)
        result = result - share * y
        shares.append(share)
    scale = torch.ones_like(slope[:, :1])
    for _, y, product, good in usable:
        scale = torch.where(good, product / dot(y, y).clamp(min=1e-30), scale)
    result = scale * result
    for (s, y, product, good), share in zip(usable, reversed(shares), strict=True):
        back = torch.where(good, dot(y, result) / product.where(good, 1), 0)
        result = result + (share - back) * s
    return result


def dot(first: Float[Tensor, "b n"], second: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    """Inner product of each row."""
    return (first * second).sum(1, keepdim=True)
