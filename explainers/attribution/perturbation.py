"""Maps from what becomes of the score when parts of the image are covered."""

from __future__ import annotations

import captum.attr
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import interpolate

from classifiers.network import Network, probabilities
from explainers.attribution.scores import ClassScores, Sign, at_least_one, signed
from explainers.base import Explainer
from explainers.batches import halving, in_batches, in_parts


class Occlusion(Explainer):
    """Loss of the target's score when a black square slides over the image.

    Args:
        network: Classifier to explain.
        window: Side of the square, share of each image side.
        stride: Step of the square, share of each image side.
        work_batch: Most occluded images that go through the network at once.
        sign: Which attributions count, see `signed`.

    Raises:
        ValueError: If ``window`` or ``stride`` is outside (0, 1], or ``work_batch`` is below 1.

    Source: Zeiler and Fergus 2014, arXiv:1311.2901, Sec. 4.2, where the square is grey.
    """

    def __init__(
        self,
        network: Network,
        window: float = 0.125,
        stride: float = 0.0625,
        work_batch: int = 64,
        sign: Sign = "absolute",
    ) -> None:
        for name, share in (("window", window), ("stride", stride)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} is a share of the image side in (0, 1], but got {share}.")
        self.network, self.window, self.stride, self.sign = network, window, stride, sign
        self.work_batch = at_least_one("work_batch", work_batch)
        self.method = captum.attr.Occlusion(ClassScores(network))

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Mean loss over the squares that cover each pixel; they cover all channels alike."""
        window = tuple(max(round(self.window * side), 1) for side in image.shape[2:])
        stride = tuple(max(round(self.stride * side), 1) for side in image.shape[2:])

        def run(work_batch: int) -> Tensor:
            return in_batches(
                lambda part, wanted: self.method.attribute(
                    part,
                    sliding_window_shapes=(image.shape[1], *window),
                    strides=(image.shape[1], *stride),
                    target=wanted,
                    perturbations_per_eval=max(work_batch // len(part), 1),
                ),
                image,
                target,
                work_batch,
            )

        return signed(halving(run, self.work_batch)[:, :1], self.sign)


class RISE(Explainer):
    """Mean of random smooth masks, weighted by the target's probability on the masked images.

    The masks are drawn once per seed and are the same for all images.

    Args:
        network: Classifier to explain.
        masks: Number of masks.
        cells: Cells of a mask's grid along each side.
        probability: That a cell stays.
        seed: Of the masks.
        work_batch: Most masked images that go through the network at once.

    Raises:
        ValueError: If a number is below 1 or ``probability`` is outside (0, 1).

    Source: Petsiuk et al. 2018, arXiv:1806.07421, Eq. 6.
    """

    def __init__(
        self,
        network: Network,
        masks: int = 4000,
        cells: int = 7,
        probability: float = 0.5,
        seed: int = 0,
        work_batch: int = 64,
    ) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"probability must be in (0, 1), but got {probability}.")
        self.network, self.probability, self.seed = network, probability, seed
        self.masks, self.cells = at_least_one("masks", masks), at_least_one("cells", cells)
        self.work_batch = at_least_one("work_batch", work_batch)

    def saliency(
        self, image: Float[Tensor, "b c h w"], target: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b h w"]:
        """Non-negative map."""
        return in_batches(self._weighted_masks, image, target, self.work_batch)

    def _weighted_masks(self, image: Tensor, target: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        grids = (torch.rand(self.masks, self.cells, self.cells, generator=generator)).to(image)
        grids = (grids < self.probability).to(image.dtype)
        shifts = torch.rand(self.masks, 2, generator=generator)
        total = torch.zeros_like(image[:, 0])

        def add(part: Tensor) -> None:
            masks = smooth_masks(grids[part], shifts[part.cpu()], image.shape[2], image.shape[3])
            masked = (image[:, None] * masks[:, None]).flatten(0, 1)
            wanted = target.repeat_interleave(len(part))[:, None]
            weight = probabilities(self.network(masked)).gather(1, wanted).view(len(image), -1)
            total.add_(torch.einsum("bn,nhw->bhw", weight, masks))

        in_parts(add, self.masks, max(self.work_batch // len(image), 1), image.device)
        return total / (self.masks * self.probability)


def smooth_masks(
    grids: Float[Tensor, "n s s"], shifts: Float[Tensor, "n 2"], height: int, width: int
) -> Float[Tensor, "n h w"]:
    """Grids upsampled bilinearly by a cell more than the image, then cut out at random shifts.

    Args:
        grids: 1 where a cell stays, 0 where it is covered.
        shifts: In [0, 1), shares of a cell.
        height: Of the image.
        width: Of the image.
    """
    cells = grids.shape[1]
    cell = (-(-height // cells), -(-width // cells))  # rounded up
    size = ((cells + 1) * cell[0], (cells + 1) * cell[1])
    large = interpolate(grids[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    corners = (shifts * torch.tensor(cell)).long().tolist()
    cut = [one[y : y + height, x : x + width] for one, (y, x) in zip(large, corners, strict=True)]
    return torch.stack(cut)
