"""Class activation maps without gradients: channels as masks (Score-CAM) or left out (Ablation)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchcam.methods
from jaxtyping import Float, Int64
from torch import Tensor

from classifiers.network import Network
from explainers.attribution.cam import checked_layer, last_spatial_layer, upsampled
from explainers.attribution.scores import Sign, at_least_one, class_scores, signed
from explainers.base import Explainer
from explainers.batches import halving, in_parts
from explainers.layers import channels_first, raw_output


class ScoreCAM(Explainer):
    """Activations weighted by the softmax of the score that each lets through as a mask.

    The masked image is the normalised one: what is masked out is the mean colour of ImageNet.

    Args:
        network: Classifier to explain.
        layer: As `GradCAM`.
        work_batch: Most masked images, of all images and channels, that go through at once.

    Raises:
        ValueError: If the backbone has no such layer, or ``work_batch`` is below 1.

    Source: Wang et al. 2020, arXiv:1910.01279, Eqs. 4 to 8.
    """

    def __init__(self, network: Network, layer: str | None = None, work_batch: int = 64) -> None:
        self.network, self.layer = network, checked_layer(network, layer)
        self.work_batch = at_least_one("work_batch", work_batch)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Non-negative map at the image's size.

        Raises:
            ValueError: If the layer's output is no map.
        """
        layer = self.layer or last_spatial_layer(self.network, image[:1])
        as_map = partial(channels_first, layer=layer, image=image.shape)

        def run(work_batch: int) -> Tensor:
            with torchcam.methods.ScoreCAM(
                self.network.backbone, layer, work_batch, reshape_transform=as_map
            ) as extractor:
                self.network(image)
                wanted: list[Callable[[Tensor], Tensor]]
                wanted = [partial(score_of, target=k) for k in target.tolist()]
                maps: Tensor = extractor(targets=wanted, normalized=False)[0]
                return maps

        return upsampled(halving(run, self.work_batch), image)


class AblationCAM(Explainer):
    """Activations weighted by how much of the target's score is lost without each channel.

    Args:
        network: Classifier to explain.
        layer: As `GradCAM`.
        work_batch: Most channels that are left out at once.
        sign: "positive" is the published method, see `signed`.

    Raises:
        ValueError: If the backbone has no such layer, or ``work_batch`` is below 1.

    Source: Desai and Ramaswamy 2020, Ablation-CAM (WACV), Eqs. 5, 6; the score that the loss is
    divided by is taken absolute, so that a negative one does not turn the map over.
    """

    def __init__(
        self,
        network: Network,
        layer: str | None = None,
        work_batch: int = 256,
        sign: Sign = "positive",
    ) -> None:
        self.network, self.layer, self.sign = network, checked_layer(network, layer), sign
        self.work_batch = at_least_one("work_batch", work_batch)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Map at the image's size.

        Raises:
            ValueError: If the layer's output is no map.
        """
        layer = self.layer or last_spatial_layer(self.network, image[:1])
        score = class_scores(self.network(image)).gather(1, target[:, None])
        raw = raw_output(self.network, layer, image)
        activation = channels_first(raw, layer, image.shape)
        each = zip(image[:, None], raw[:, None], target, strict=True)
        without = torch.stack([self._ablated(layer, *one) for one in each])
        weight = (score - without) / score.abs().clamp(min=1e-12)
        return upsampled(signed(activation * weight[:, :, None, None], self.sign), image)

    def _ablated(
        self, layer: str, image: Float[Tensor, "1 c h w"], raw: Tensor, target: Int64[Tensor, ""]
    ) -> Float[Tensor, " k"]:
        """The target's score without each channel of the layer's output ``raw`` in turn."""
        first = channels_first(raw, layer, image.shape).shape == raw.shape
        channels = raw if first else raw.movedim(-1, 1)
        scores = raw.new_empty(channels.shape[1])

        def run(part: Tensor) -> None:
            copies = channels.expand(len(part), *channels.shape[1:]).clone()
            copies[torch.arange(len(part), device=part.device), part] = 0
            logits = continued(
                self.network, layer, image, copies if first else copies.movedim(1, -1)
            )
            scores[part] = class_scores(logits)[:, target]

        in_parts(run, len(scores), self.work_batch, image.device)
        return scores


def score_of(logits: Float[Tensor, " k"], target: int) -> Float[Tensor, ""]:
    """The target's score from the logits of one image."""
    return class_scores(logits[None])[0, target]


def continued(
    network: Network, layer: str, image: Float[Tensor, "1 c h w"], outputs: Tensor
) -> Float[Tensor, "n k"]:
    """Logits where a layer gives ``outputs`` (n, ...) instead of its own for the one image.

    The layers before run once where what they give is added to the outputs, by broadcasting, and
    n times where it is put beside them (DenseNet).
    """
    handle = network.backbone.get_submodule(layer).register_forward_hook(lambda *_: outputs)
    normalised = network.normalised(image)
    try:
        logits: Tensor = network.backbone(normalised)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logits = network.backbone(normalised.expand(len(outputs), -1, -1, -1))
    finally:
        handle.remove()
    return logits
