"""Seconds per explanation: Single's generators against Grad-CAM, and what ten views cost.

python -m benchmarks.explaining   # after: pip install -e '.[export,benchmark]'
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pandas as pd
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stopwatch import seconds
from classifiers.memory import keep_freed_memory
from classifiers.network import Network
from explainers.attribution import GradCAM
from explainers.learned import Distilled, Geometry, Single
from explainers.learned.base import OnePass
from explainers.views import Views

Run = Callable[[Tensor], object]
Form = Literal["eager", "compiled", "onnx"]

GEOMETRIES = {
    "Single, plain 16-32-64-128": Geometry(channels=3),
    "Single, the authors' 16-32-64": Geometry("residual", (16, 32, 64), 3),
    "Single, minimal MobileNetV3-small": Geometry(
        "timm-mobilenetv3_small_minimal_100", (16, 16, 32, 64, 128), 3
    ),
    "Single, ResNet18": Geometry("resnet18", (16, 16, 32, 64), 3),
}
STUDENT = "Distilled, 16-32-64 at a quarter"


def explainers(network: Network) -> Iterator[tuple[str, OnePass]]:
    """What is timed, by name; untrained, since values do not change the time."""
    teacher = Single(network, 1, geometry=Geometry(channels=3))
    yield STUDENT, Distilled(teacher)
    yield f"{STUDENT}, with features", Distilled(teacher, features=True)
    for name, geometry in GEOMETRIES.items():
        yield name, Single(network, 1, geometry=geometry)


class Map(nn.Module):
    """An explainer's map as a module, to be compiled and exported."""

    def __init__(self, explainer: OnePass) -> None:
        super().__init__()
        self.explainer = explainer

    def forward(self, image: Tensor) -> Tensor:
        """Map of each image."""
        return self.explainer.plain(image)


def grad_cam_package(network: Network) -> Run:
    """Grad-CAM of the grad-cam package at the last stage, given the class."""
    from pytorch_grad_cam import GradCAM as Packaged
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    method = Packaged(network.backbone, [network.backbone.layer4])
    return lambda image: method(network.normalised(image), [ClassifierOutputTarget(0)] * len(image))


def torchcam_package(network: Network) -> Run:
    """Grad-CAM of torchcam at the last stage, given the class, resized to the image."""
    from torchcam.methods import GradCAM as Packaged

    method = Packaged(network.backbone, "layer4")

    def run(image: Tensor) -> object:
        scores = network.backbone(network.normalised(image))
        maps = method([0] * len(image), scores)[0]
        return nn.functional.interpolate(maps[:, None], image.shape[2:], mode="bilinear")

    return run


def onnx_map(explainer: OnePass, image: Tensor, folder: Path) -> Run:
    """The map in ONNX Runtime, on as many threads as torch has, or on the GPU."""
    import onnxruntime as ort

    path = folder / "map.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Map(explainer), (image,), path, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if image.is_cuda else "CPUExecutionProvider"
    session = ort.InferenceSession(path, options, providers=[provider])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image.cpu().numpy()})


def multiply_adds(explainer: OnePass, size: int) -> float:
    """Giga multiply-adds of one map."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        explainer.plain(torch.rand(1, 3, size, size))
    return float(counter.get_total_flops()) / 2e9


def forms(
    explainer: OnePass, image: Tensor, chosen: Sequence[Form], folder: Path
) -> Iterator[tuple[str, Run]]:
    """The explanation in each form: name and function."""
    if "eager" in chosen:
        yield "eager", explainer.explain
    if "compiled" in chosen:
        torch.compiler.reset()  # else the next module counts as one recompilation too many
        yield "compiled", torch.no_grad()(torch.compile(Map(explainer)))
    if "onnx" in chosen:
        yield "onnx", onnx_map(explainer, image, folder)


def main(
    device: str = "cpu",
    threads: int = 2,
    size: int = 224,
    batches: list[int] = [1, 8, 32],  # noqa: B006  its text is in the help
    repeats: int = 5,
    chosen: list[Form] = ["eager", "compiled", "onnx"],  # noqa: B006
    only: list[str] | None = None,
) -> None:
    """Print a line for each generator, batch and form: seconds, and Grad-CAM's in units of them.

    Args:
        device: Of both.
        threads: Of torch on the CPU.
        size: Side of the images, pixels.
        batches: Numbers of images in a call.
        repeats: Calls of which the median is taken.
        chosen: Forms of the explanation.
        only: Some of the generators, by name.
    """
    torch.set_num_threads(threads)
    table = measured(device, size, batches, repeats, chosen, only)
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep=""))


def measured(
    device: str,
    size: int,
    batches: Sequence[int],
    repeats: int,
    chosen: Sequence[Form],
    only: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Seconds of each call, and Grad-CAM's in units of them ("x grad-cam")."""
    keep_freed_memory()
    torch.manual_seed(0)
    network, theirs = (Network("resnet50").eval().to(device) for _ in range(2))
    rows: list[dict[str, object]] = []
    for batch in batches:
        image = torch.rand(batch, 3, size, size).to(device)
        rivals: dict[str, Run] = {
            "grad-cam": torch.enable_grad()(grad_cam_package(theirs)),
            "torchcam": torch.enable_grad()(torchcam_package(theirs)),
            "ours": GradCAM(theirs).explain,
        }
        slow = {name: seconds(partial(run, image), repeats) for name, run in rivals.items()}
        rows += [{"what": f"Grad-CAM, {k}", "batch": batch, "s": v} for k, v in slow.items()]
        for name, explainer in explainers(network):
            if only and name not in only:
                continue
            told = {"what": name, "G": multiply_adds(explainer.eval(), size), "batch": batch}
            explainer.to(device)
            with TemporaryDirectory() as folder, torch.no_grad():
                for form, run in forms(explainer, image, chosen, Path(folder)):
                    own = seconds(partial(run, image), repeats)
                    ratios = {f"x {k}": v / own for k, v in slow.items()}
                    rows.append({**told, "form": form, "s": own, **ratios})
            views = partial(explainer.explain, image, views=Views(10))
            rows.append({**told, "form": "10 views", "s": seconds(views, repeats)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
