"""Seconds of a training step by train.py against a bare PyTorch loop of the same step.

python -m benchmarks.training   # phantom, 64 px, batch 32
"""

from __future__ import annotations

import json
import time
from copy import deepcopy
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.profiler import profile

import train
from classifiers.network import decide
from explainers.learned.losses import distance, total_variation, weight_proximity


class StepTimes(Callback):
    """Keeps the moments at which training steps end.

    Args:
        path: JSON file of seconds, written when training ends.
    """

    def __init__(self, path: str) -> None:
        self.path, self.moments = Path(path), list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        """Take the time, of the device's work too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self.path.write_text(json.dumps(self.moments))


def bare(module: LightningModule, batches: list[Any], augment: Any, steps: int) -> list[float]:
    """Seconds of each step without Lightning: batches that are there already, loss, Adam."""
    module.train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-6)
    moments = []
    for batch in islice(cycle(batches), steps):
        image: Tensor = augment(batch["image"], batch["mask"][:, None].float())[0]
        optimizer.zero_grad()
        terms, _ = module.objective(image)  # type: ignore[operator]
        terms["loss"].backward()
        optimizer.step()
        if image.is_cuda:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
    return moments


class AsWritten(LightningModule):
    """The same step before anything was done for speed: the formulas, line by line.

    Weights in torch's default layout, three passes of the classifier, whose gradients are kept.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.explainer = deepcopy(module).to(memory_format=torch.contiguous_format)
        self.explainer.network.requires_grad_(True)

    def objective(self, image: Tensor) -> tuple[dict[str, Tensor], None]:
        """Eq. 5."""
        explainer, weights = self.explainer, self.explainer.weights
        network = explainer.network
        decision = decide(network(image), network.threshold)
        similar, adversarial = explainer(image)
        kept, flipped = explainer.classification(
            network(similar), network(adversarial), decision, None
        )
        loss = weights.similar * distance(image, similar)
        loss += weights.adversarial * distance(image, adversarial)
        loss += weights.pair * distance(similar, adversarial)
        loss += weights.classify_similar * kept + weights.classify_adversarial * flipped
        loss += weights.variation * total_variation(similar - adversarial)
        loss += weights.proximity * weight_proximity(*explainer.paired_weights())
        return {"loss": loss}, None


def step_seconds(moments: list[float]) -> float:
    """Median time between steps, without the first three."""
    return median(after - before for before, after in pairwise(moments[3:]))


def fit(preset: str, out: Path, size: int, batch: int, steps: int, *more: str) -> train.TrainCLI:
    """Run train.py in this process on as many training images as the steps of an epoch need."""
    own = [f"--data.loading.size={size}", f"--data.loading.batch_size={batch}", f"--out={out}"]
    own += [f"--data.train={steps * batch}"]
    quiet = ["--logging=csv", "--trainer.limit_val_batches=1"]
    return train.main(["fit", "-c", preset, *own, *quiet, *more])


def main(
    folder: str = "configs/phantom",
    explainer: str = "single1_w_tv",
    backbone: str = "resnet18",
    size: int = 64,
    batch: int = 32,
    steps: int = 30,
    threads: int = 2,
    rounds: int = 3,
    profiled: bool = False,
) -> None:
    """Print the median of both, and how much longer train.py's step is.

    Args:
        folder: Of the presets.
        explainer: Preset that is timed.
        backbone: Of the classifier, which is trained for one step.
        size: Of the images, pixels.
        batch: Images of a step.
        steps: Of each run.
        threads: Of torch on the CPU.
        rounds: Runs of both in turn.
        profiled: Print where five bare steps spend their time, too: of the formulas as they are
            written, and of ours.
    """
    torch.set_num_threads(threads)
    ours, plain = measured(folder, explainer, backbone, size, batch, steps, rounds, profiled)
    print(f"train.py {median(ours):.4f} s a step, a bare loop {median(plain):.4f} s")
    print(f"{100 * (median(ours) / median(plain) - 1):.1f} % longer, rounds {ours} {plain}")


def measured(
    folder: str,
    explainer: str,
    backbone: str,
    size: int,
    batch: int,
    steps: int,
    rounds: int,
    profiled: bool = False,
) -> tuple[list[float], list[float]]:
    """Seconds of a step by train.py and by a bare loop, in each round."""
    ours, plain = list[float](), list[float]()
    with TemporaryDirectory() as name:
        out = Path(name)
        named = f"--model.network.backbone={backbone}", "--model.network.weights=null"
        classifier = out / "classifier"
        once = *named, "--trainer.max_epochs=1"
        fit(f"{folder}/classifier.yaml", classifier, size, batch, 1, *once)
        options = [
            f"--model.network={classifier}/last.ckpt",
            "--trainer.max_epochs=2",  # the first draws the images, which are kept in memory
            "--trainer.callbacks=benchmarks.training.StepTimes",
            f"--trainer.callbacks.path={out}/moments.json",
        ]
        for _ in range(rounds):
            cli = fit(f"{folder}/{explainer}.yaml", out / "explainer", size, batch, steps, *options)
            moments = json.loads((out / "moments.json").read_text())[-steps:]
            ours.append(step_seconds(moments))
            module = cli.model.to(cli.trainer.strategy.root_device)
            loader = islice(cli.datamodule.train_dataloader(), steps)
            batches = [cli.datamodule.transfer_batch_to_device(b, module.device, 0) for b in loader]
            plain.append(step_seconds(bare(module, batches, cli.datamodule.augment, steps)))
    for stepped in (AsWritten(module), module) if profiled else ():
        bare(stepped, batches, cli.datamodule.augment, 3)  # first pages and kernels
        with profile() as found:
            bare(stepped, batches, cli.datamodule.augment, 5)
        print(f"{type(stepped).__name__}, 5 steps")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    return ours, plain


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
