from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision.io import read_image

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.evaluation.callbacks import GeneratedImages, Panel, StageCallback, WeakLocalisation
from explainers.evaluation.metrics import image_similarity, localisation_scores
from explainers.evaluation.pictures import panel
from explainers.learned import Geometry, Single
from explainers.views import Views

VIEWS = Views(count=3)


def batches() -> list[dict[str, Any]]:
    """Three batches of unequal size; the masks of some images are unknown."""
    made = []
    for seed, count in enumerate((4, 3, 1)):
        generator = torch.Generator().manual_seed(seed)
        has_mask = torch.arange(count) % 2 == (1 if seed else 0)
        mask = torch.rand(count, 32, 32, generator=generator) < 0.2
        made.append(
            {
                "image": torch.rand(count, 1, 32, 32, generator=generator),
                "label": has_mask.long(),
                "mask": mask & has_mask[:, None, None],
                "has_mask": has_mask,
                "id": [f"image {seed} {k}" for k in range(count)],
                "columns": {},
            }
        )
    return made


def joined(key: str) -> Tensor:
    return torch.cat([batch[key] for batch in batches()])


def loader() -> DataLoader[dict[str, Any]]:
    return DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]


def explainer(num_logits: int = 1) -> Single:
    torch.manual_seed(0)
    network = Network("test_resnet", num_logits)
    network(joined("image"))
    network.eval().requires_grad_(False)
    head = network.backbone.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    head.weight.mul_(100)
    head.bias.sub_(network(joined("image")).median(0).values)
    constant = Optimisation(1e-2, "constant")
    return Single(network, 1, geometry=Geometry(widths=(4, 6)), optimisation=constant).eval()


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | options,
    )


class Counted(StageCallback):
    """Notes when it is called."""

    def __init__(self, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        self.seen: list[str] = []

    def reset(self, module: LightningModule) -> None:
        self.seen.append("reset")

    def add(
        self, module: LightningModule, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> None:
        self.seen.append("add")

    def finish(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, Tensor]:
        self.seen.append(f"{stage} {trainer.current_epoch}")
        return {"seen": torch.tensor(float(len(self.seen)))}


def test_the_sanity_check_is_left_out(tmp_path: Path) -> None:
    counted = Counted()
    run = trainer(tmp_path, counted, num_sanity_val_steps=2)
    run.fit(explainer(), loader(), loader())
    assert counted.seen == ["reset", "add", "add", "add", "val 0"]
    assert float(run.callback_metrics["val/seen"]) == 5


def test_every_n_epochs_and_the_last_one(tmp_path: Path) -> None:
    counted = Counted(2)
    options = {"max_epochs": 5, "limit_train_batches": 1, "limit_val_batches": 1}
    trainer(tmp_path, counted, **options).fit(explainer(), loader(), loader())
    assert counted.seen[2::3] == ["val 1", "val 3", "val 4"]


def test_validation_and_test_by_themselves_always_count(tmp_path: Path) -> None:
    counted = Counted(3)
    run = trainer(tmp_path, counted, max_epochs=10)
    run.validate(explainer(), loader(), verbose=False)
    run.test(explainer(), loader(), verbose=False)
    once = ["reset", "add", "add", "add"]
    assert counted.seen == [*once, "val 0", *once, "test 0"]


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be 1 or more, but got 0"):
        WeakLocalisation(every_n_epochs=0)
    with pytest.raises(TypeError, match="Panel scores explainers, but the model is a BoringModel"):
        trainer(tmp_path, Panel()).validate(BoringModel(), verbose=False)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_localisation_is_that_of_all_annotated_images_at_once(stage: str, tmp_path: Path) -> None:
    module = explainer()
    run = trainer(tmp_path, WeakLocalisation(VIEWS, smoothing=0.1))
    evaluate = run.validate if stage == "val" else run.test
    (logged,) = evaluate(module, loader(), verbose=False)
    known = joined("has_mask")
    image, mask = joined("image")[known], joined("mask")[known]
    for views_name, views in {"plain": None, "views": VIEWS}.items():
        for form, sigma in {"raw": 0.0, "smoothed": 0.1}.items():
            maps = module.explain(image, views=views, smoothing=sigma)
            prefix = f"{stage}/{views_name}_{form}"
            assert logged[f"{prefix}/count"] == 3
            for name, values in localisation_scores(maps, mask).items():
                found = logged[f"{prefix}/{name}"]
                assert found == pytest.approx(float(values.mean()), rel=1e-4), name


def test_only_the_wanted_variants_are_scored(tmp_path: Path) -> None:
    run = trainer(tmp_path, WeakLocalisation())
    (logged,) = run.validate(explainer(), loader(), verbose=False)
    variants = {name.split("/")[1] for name in logged if name.count("/") == 2}
    assert variants == {"plain_raw"}


@pytest.mark.parametrize("num_logits", [1, 3])
def test_generated_images_are_scored_as_all_at_once(num_logits: int, tmp_path: Path) -> None:
    module = explainer(num_logits)
    run = trainer(tmp_path, GeneratedImages())
    (logged,) = run.test(module, loader(), verbose=False)
    image = joined("image")
    similar, adversarial = (generated.detach() for generated in module(image))
    y, kept, flipped = (module.network.decide(x) for x in (image, similar, adversarial))
    for k in sorted(set(y.tolist())):
        shares = (kept == y)[y == k], (flipped != y)[y == k]
        for name, share in zip(("kept", "flipped"), shares, strict=True):
            assert logged[f"test/decisions/{name}_class{k}"] == pytest.approx(
                float(share.float().mean())
            )
    assert logged["test/decisions/kept"] == pytest.approx(float((kept == y).float().mean()))
    assert logged["test/decisions/flipped"] == pytest.approx(float((flipped != y).float().mean()))
    pairs = {"image_similar": (image, similar), "image_adversarial": (image, adversarial)}
    for name, pair in (pairs | {"similar_adversarial": (similar, adversarial)}).items():
        ssim, psnr = image_similarity(*pair)
        assert logged[f"test/ssim/{name}"] == pytest.approx(float(ssim.mean()), abs=1e-4)
        assert logged[f"test/psnr/{name}"] == pytest.approx(float(psnr.mean()), abs=1e-3)


def test_identical_images_do_not_make_the_psnr_infinite(tmp_path: Path) -> None:
    module = explainer()
    module.forward = lambda image: (image, 0.5 * image)  # type: ignore[method-assign]
    (logged,) = trainer(tmp_path, GeneratedImages()).test(module, loader(), verbose=False)
    assert logged["test/identical/image_similar"] == 8
    assert logged["test/psnr/image_similar"] != logged["test/psnr/image_similar"]  # NaN: no pair
    assert logged["test/identical/image_adversarial"] == 0


@pytest.mark.parametrize(
    ("name", "ratio", "times"), [("lesion", 4, 1), ("healthy", 1, 1), ("healthy", 4, 0)]
)
def test_a_class_whose_decisions_are_not_flipped_is_told_once_a_training(
    name: str, ratio: int, times: int, tmp_path: Path
) -> None:
    """The normal class is not told where it is given up for the abnormal ones."""
    module = explainer()
    module.optimisation = replace(module.optimisation, abnormal_per_normal=ratio)
    module.network.class_names = ["healthy", "lesion"]
    decided = module.network.decide(joined("image")) == module.network.class_names.index(name)
    only = joined("image")[decided][:1]

    def only_to_one(image: Tensor) -> tuple[Tensor, Tensor]:
        return image, only.expand_as(image) + 0 * next(module.parameters()).sum()

    module.forward = only_to_one  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, GeneratedImages(), max_epochs=2).fit(module, loader(), loader())
    texts = [str(one.message) for one in told if "flip" in str(one.message)]
    assert texts == times * [
        f"The adversarial images flip 0.0% of the validation images decided {name!r}: they show "
        "no evidence of it, so compare the map with others (evaluate.py compare) before you trust "
        "it on such images."
    ]


@pytest.mark.parametrize("rows", [2, 6])
def test_the_panel_shows_the_first_annotated_images(rows: int, tmp_path: Path) -> None:
    module = explainer()
    run = trainer(tmp_path, Panel(rows, VIEWS, smoothing=0.1))
    run.validate(module, loader(), verbose=False)
    shown = min(rows, 3)  # three of the images are annotated
    chosen = joined("has_mask").nonzero().flatten()[:shown]
    image, mask = joined("image")[chosen], joined("mask")[chosen]
    similar, adversarial = module(image)
    maps = module.explain(image, views=VIEWS, smoothing=0.1)
    written = read_image(str(tmp_path / "panels" / "val_0000.png"))
    assert written.shape == (3, 34 * shown + 2, 34 * 5 + 2)
    expected = panel(image, similar, adversarial, maps, mask)
    assert_close(written.float(), expected.float(), atol=1.0, rtol=0)


def test_the_panel_reaches_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="events")
    run = trainer(tmp_path, Panel(2), logger=logger)
    run.validate(explainer(), loader(), verbose=False)
    logger.finalize("success")
    events = accumulators.EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Tags()["images"] == ["val/panel"]
    (shown,) = events.Images("val/panel")
    assert (shown.height, shown.width) == (34 * 2 + 2, 34 * 5 + 2)


def test_without_annotated_images_there_is_no_panel(tmp_path: Path) -> None:
    blind = [batch | {"has_mask": torch.zeros_like(batch["has_mask"])} for batch in batches()]
    stream = DataLoader(blind, batch_size=None)  # type: ignore[arg-type, var-annotated]
    trainer(tmp_path, Panel()).validate(explainer(), stream, verbose=False)
    assert not (tmp_path / "panels").exists()


def test_the_module_comes_back_as_it_was(tmp_path: Path) -> None:
    module = explainer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callbacks = WeakLocalisation(VIEWS), GeneratedImages(), Panel()
    trainer(tmp_path, *callbacks).validate(module, loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {
        f"network.{name}" for name, _ in module.network.named_parameters()
    }
