"""Generated images: are they near the image, and does the classifier decide as it should?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.utilities import dim_zero_cat


def kept(
    decision: Int64[Tensor, " b"], decision_similar: Int64[Tensor, " b"]
) -> Bool[Tensor, " b"]:
    """Whether the similar image x_s is decided like x."""
    return decision_similar == decision


def flipped(
    decision: Int64[Tensor, " b"], decision_adversarial: Int64[Tensor, " b"]
) -> Bool[Tensor, " b"]:
    """Whether the adversarial image x_a is decided otherwise than x."""
    return decision_adversarial != decision


def decision_auc(
    probability: Float[Tensor, "b k"], decision: Int64[Tensor, " b"]
) -> Float[Tensor, ""]:
    """ROC AUC of the class probabilities against decisions: class 1, or one-vs-rest mean.

    Args:
        probability: Of each class in [0, 1]; two columns for a one-logit network.
        decision: On the original images; the mean runs over the classes that occur in it.

    Returns:
        In [0, 1], ties counted half; NaN where all decisions agree.

    Source: arXiv:2012.07332, Table IV.
    """
    k = probability.shape[1]
    truths = {column: decision == column for column in (range(k) if k > 2 else [1])}
    scores = [
        binary_auroc(probability[:, column], truth.long())
        for column, truth in truths.items()
        if truth.any() and not truth.all()
    ]
    return torch.stack(scores).mean() if scores else probability.new_tensor(torch.nan)


class Decisions(Metric):
    """Share of decisions kept and flipped, overall and per decided class, and their ROC AUC.

    Args:
        num_classes: Number of classes decided between: 2 for a one-logit network.
    """

    full_state_update = False
    decided: Tensor
    kept: Tensor
    flipped: Tensor
    decision: list[Tensor]
    probability_similar: list[Tensor]
    probability_adversarial: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("decided", "kept", "flipped"):
            self.add_state(name, torch.zeros(num_classes).long(), dist_reduce_fx="sum")
        for name in ("decision", "probability_similar", "probability_adversarial"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        decision: Int64[Tensor, " b"],
        probability_similar: Float[Tensor, "b k"],
        probability_adversarial: Float[Tensor, "b k"],
        decision_similar: Int64[Tensor, " b"],
        decision_adversarial: Int64[Tensor, " b"],
    ) -> None:
        """Add a batch: the classifier's decisions on x, and what it says of x_s and x_a."""
        self.decided = self.decided + self._per_class(decision)
        self.kept = self.kept + self._per_class(decision[kept(decision, decision_similar)])
        hit = flipped(decision, decision_adversarial)
        self.flipped = self.flipped + self._per_class(decision[hit])
        self.decision.append(decision)
        self.probability_similar.append(probability_similar)
        self.probability_adversarial.append(probability_adversarial)

    def _per_class(self, decision: Int64[Tensor, " n"]) -> Int64[Tensor, " k"]:
        return decision.bincount(minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Shares "kept", "flipped", "kept_class0" .. and "auc_similar", "auc_adversarial".

        NaN for a class that was never decided. The adversarial AUC is that of 1 - f(x_a), taken
        as 1 - AUC of f(x_a), which small probabilities cannot turn into ties.
        """
        decision = dim_zero_cat(self.decision)
        similar = dim_zero_cat(self.probability_similar)
        adversarial = dim_zero_cat(self.probability_adversarial)
        return {
            **self._shares("kept", self.kept),
            **self._shares("flipped", self.flipped),
            "auc_similar": decision_auc(similar, decision),
            "auc_adversarial": 1 - decision_auc(adversarial, decision),
        }

    def _shares(self, name: str, count: Int64[Tensor, " k"]) -> dict[str, Tensor]:
        each = enumerate(count / self.decided)
        per_class = {f"{name}_class{k}": share for k, share in each}
        return {name: count.sum() / self.decided.sum(), **per_class}


def image_similarity(
    first: Float[Tensor, "b c h w"],
    second: Float[Tensor, "b c h w"],
    region: Bool[Tensor, "b h w"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """SSIM and PSNR (dB) of each pair of images in [0, 1]; PSNR is infinite if they are identical.

    SSIM: Gaussian window 11, sigma 1.5, averaged over channels and over the pixels whose window
    lies inside the image, as in scikit-image. Images are at least 11 pixels wide and high.

    Args:
        first: Images.
        second: Images.
        region: Pixels that count, everywhere by default; NaN where an image has none.

    Source: Wang et al. 2004; arXiv:2012.07332, Table V.
    """
    kind = torch.promote_types(first.dtype, torch.float32)  # 16 bit would round every step
    first, second = first.to(kind), second.to(kind)
    result = structural_similarity_index_measure(
        first, second, sigma=1.5, reduction="none", data_range=1.0, return_full_image=True
    )
    assert isinstance(result, tuple)  # its own mean counts the reflected border, of 5 pixels
    weight = torch.ones_like(first[:, :1]) if region is None else region[:, None].to(kind)
    weight = weight.expand_as(first)
    inside = weight[..., 5:-5, 5:-5]
    ssim = (result[1][..., 5:-5, 5:-5] * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    pair = first * weight, second * weight  # outside the region they agree, which only dilutes
    psnr = peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ssim, psnr + 10 * weight.mean((1, 2, 3)).log10()


class ImageSimilarity(Metric):
    """Mean SSIM and PSNR of pairs of images; identical pairs are left out of the mean PSNR."""

    full_state_update = False
    total: Tensor
    count: Tensor
    identical: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("identical", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, first: Float[Tensor, "b c h w"], second: Float[Tensor, "b c h w"]) -> None:
        """Add a batch of pairs."""
        ssim, psnr = image_similarity(first, second)
        infinite = psnr.isinf()
        self.total = self.total + torch.stack([ssim.double().sum(), psnr[~infinite].double().sum()])
        self.count = self.count + len(ssim)
        self.identical = self.identical + infinite.sum()

    def compute(self) -> dict[str, Tensor]:
        """Mean "ssim", mean "psnr" (dB) of the pairs that differ, number of "identical" pairs."""
        return {
            "ssim": self.total[0] / self.count,
            "psnr": self.total[1] / (self.count - self.identical),
            "identical": self.identical.double(),
        }
