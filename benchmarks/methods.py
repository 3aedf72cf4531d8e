"""Seconds per image of batched methods against what a user would pick instead, in one run.

python -m benchmarks.methods   # after: pip install -e '.[benchmark]'
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.stopwatch import seconds
from classifiers.memory import keep_freed_memory
from classifiers.network import Network
from explainers import attribution

Run = Callable[[Tensor], object]


def gradcam_package(name: str, network: Network) -> Run:
    """A class of the grad-cam package on the backbone's last stage, with its own batch size."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    method = getattr(pytorch_grad_cam, name)(network.backbone, [network.backbone.layer4])

    def run(image: Tensor) -> object:
        with torch.enable_grad():
            targets = [ClassifierOutputTarget(0)] * len(image)
            return method(network.normalised(image), targets)

    return run


def captum_smoothgrad(network: Network) -> Run:
    """NoiseTunnel over Saliency, 25 samples, everything else by default."""
    method = captum.attr.NoiseTunnel(captum.attr.Saliency(network))
    return lambda image: method.attribute(
        image.clone().requires_grad_(), nt_samples=25, stdevs=0.15, target=0
    )


def captum_integrated(network: Network) -> Run:
    """IntegratedGradients by default: 50 steps of all images at once."""
    method = captum.attr.IntegratedGradients(network)
    return lambda image: method.attribute(image, target=0)


def saliency_xrai(network: Network) -> Run:
    """The saliency package, one image at a time, 100 steps from black and white."""
    import saliency.core as saliency

    def gradients(images: np.ndarray, *_: Any, **__: Any) -> dict[str, np.ndarray]:
        free = (
            torch.from_numpy(np.asarray(images))
            .permute(0, 3, 1, 2)
            .float()
            .to(network.mean.device)
            .requires_grad_()
        )
        slope = torch.autograd.grad(network(free)[:, 0].sum(), free)[0]
        return {saliency.INPUT_OUTPUT_GRADIENTS: slope.permute(0, 2, 3, 1).cpu().numpy()}

    def run(image: Tensor) -> object:
        arrays = image.permute(0, 2, 3, 1).cpu().numpy()
        return [saliency.XRAI().GetMask(array, gradients, batch_size=20) for array in arrays]

    return run


def rise_loop(network: Network, masks: int) -> Run:
    """RISE as its formula reads: one masked image after the other."""

    def run(image: Tensor) -> object:
        for one in image:
            total = torch.zeros_like(one[0])
            for _ in range(masks):
                grid = (torch.rand(1, 1, 8, 8) < 0.5).to(one)
                mask = interpolate(grid, one.shape[1:], mode="bilinear")[0, 0]
                total += network((one * mask)[None]).sigmoid()[0, 0] * mask
        return None

    return run


def one_by_one(method: Any) -> Run:
    """The same method, an image at a time."""
    return lambda image: [method.explain(one[None]) for one in image]


def main(
    device: str = "cpu",
    size: int = 224,
    batch: int = 4,
    repeats: int = 3,
    threads: int = 2,
    only: list[str] | None = None,
) -> None:
    """Print one line a method: seconds per image, and the ratio.

    What is picked instead gets the classifier in torch's default layout, as a user has it.

    Args:
        device: Of both.
        size: Side of the images, pixels.
        batch: Images.
        repeats: Calls of which the median is taken.
        threads: Of torch on the CPU.
        only: Some of the methods, by name.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    network = Network("resnet18").eval().requires_grad_(False).to(device)
    usual = deepcopy(network).to(memory_format=torch.contiguous_format)
    image = torch.rand(batch, 3, size, size).to(device)
    pairs: dict[str, tuple[Any, Callable[[], Run], str]] = {
        "Ablation-CAM": (
            attribution.AblationCAM(network),
            lambda: gradcam_package("AblationCAM", usual),
            "grad-cam",
        ),
        "Score-CAM": (
            attribution.ScoreCAM(network),
            lambda: gradcam_package("ScoreCAM", usual),
            "grad-cam",
        ),
        "SmoothGrad": (
            attribution.SmoothGrad(network),
            lambda: captum_smoothgrad(usual),
            "captum",
        ),
        "Integrated Gradients": (
            attribution.IntegratedGradients(network),
            lambda: captum_integrated(usual),
            "captum",
        ),
        "XRAI": (attribution.XRAI(network), lambda: saliency_xrai(usual), "saliency"),
        "RISE, 200 masks": (
            attribution.RISE(network, 200),
            lambda: rise_loop(usual, 200),
            "a loop over masks",
        ),
        "BBMP, 20 steps": (
            attribution.BBMP(network, 20),
            lambda: one_by_one(attribution.BBMP(usual, 20)),
            "a loop over images",
        ),
    }
    for name, (ours, other, what) in pairs.items():
        if not only or name in only:
            own = seconds(partial(ours.explain, image), repeats) / batch
            theirs = seconds(partial(other(), image), repeats) / batch
            print(f"{name}: {own:.3f} s an image, {what} {theirs:.3f}, ratio {theirs / own:.1f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
