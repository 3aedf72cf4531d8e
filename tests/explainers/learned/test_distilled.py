from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from torch.testing import assert_close
from torch.utils.data import DataLoader

from classifiers.network import Network
from classifiers.optimisation import Optimisation
from explainers.attribution import Gradient
from explainers.learned import Distilled, Duo, Geometry, MaskGenerator, Single, load_explainer
from explainers.learned.distilled import agreement
from explainers.learned.taught import Taught
from explainers.views import Views

SMALL = Geometry(widths=(4, 6))
VIEWS = Views(3, vertical_flip=0.0)


def images(count: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def teacher(build: type[Single] | type[Duo] = Single) -> Single | Duo:
    torch.manual_seed(0)
    return build(Network("test_resnet"), geometry=SMALL).eval()


def distilled(**options: Any) -> Distilled:
    settings: dict[str, Any] = {"views": VIEWS, "widths": (4, 6), "reduction": 2} | options
    return Distilled(teacher(), **settings)


def batches(count: int = 3) -> DataLoader[dict[str, Any]]:
    parts: Any = [
        {"image": images(4, seed=k), "id": [f"{k}{i}" for i in range(4)]} for k in range(count)
    ]
    return DataLoader(parts, batch_size=None)


def trained(explainer: Distilled, folder: Path, epochs: int = 1) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(explainer, batches(), batches(1))
    return trainer


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("size", [32, 35])
def test_a_map_is_the_students_alone(size: int, features: bool) -> None:
    explainer, calls = distilled(features=features).eval(), list[str]()
    explainer.scale.fill_(2.0)
    expected = explainer.saliency(images(2, size), torch.zeros(2).long())
    explainer.network.register_forward_pre_hook(lambda *_: calls.append("classifier"))
    explainer.teacher.register_forward_pre_hook(lambda *_: calls.append("teacher"))
    maps = explainer.explain(images(2, size))
    assert maps.shape == (2, size, size)
    assert (maps > 0).all()
    assert_close(maps, expected)
    assert calls == ["classifier"] * features


@pytest.mark.parametrize("features", [False, True])
def test_a_student_that_reads_the_classifier_changes_with_it(features: bool) -> None:
    explainer = distilled(features=features).eval()
    explainer.scale.fill_(1.0)
    before = explainer.explain(images())
    torch.manual_seed(1)
    explainer.network = Network("test_resnet").eval()  # as evaluate.py sanity does
    same = torch.equal(explainer.explain(images()), before)
    assert same is not features


def test_the_map_is_the_mean_of_both_branches_which_learn_each_for_itself() -> None:
    explainer, maps = distilled(features=True).eval(), torch.rand(4, 1, 16, 16)
    explainer.scale.fill_(0.5)
    image, read = explainer.student(images()).split(1, 1)
    assert not torch.equal(image, read)
    own = [(branch - maps / 0.5).abs().mean() for branch in (image, read)]
    assert_close(explainer.difference(images(), maps), (own[0] + own[1]) / 2)
    larger = interpolate((image + read) / 4, scale_factor=2.0, mode="bilinear")
    assert_close(explainer.plain(images()), larger[:, 0])


def test_the_teacher_is_asked_once_for_each_name() -> None:
    explainer = distilled(smoothing=0.1)
    found = explainer.targets(images(), ["a", "b", "c", "d"])
    maps = explainer.teacher.explain(images(), views=VIEWS, smoothing=0.1)
    assert_close(found, avg_pool2d(maps[:, None], 2))
    others = explainer.targets(images(seed=1), ["d", "new", "a", "b"])  # other pixels, known names
    assert_close(others[[0, 2, 3]], found[[3, 0, 1]])
    assert not torch.equal(others[1], found[1])


def test_maps_agree_where_none_is_low() -> None:
    one = torch.tensor([[[4.0, 1.0], [1.0, 2.0]]])  # of mean 2
    other = torch.tensor([[[9.0, 1.0], [-7.0, 2.0]]])  # 3
    assert agreement([one]) is one
    expected = torch.tensor([[[2 * 3, 1 / 2 / 3], [1 / 2 * 0.001, 2 / 3]]]).sqrt()
    assert_close(agreement([one, other]), expected)
    assert_close(agreement([7 * one, other]), expected)
    silent = agreement([one, torch.zeros(1, 2, 2)])  # it rules nothing out: the order stays
    assert_close(silent.flatten().argsort(stable=True), one.flatten().argsort(stable=True))


def test_the_agreement_with_witnesses_is_learnt(tmp_path: Path) -> None:
    explainer = distilled(smoothing=0.1, witnesses={"Gradient": Gradient}).train()
    with torch.inference_mode():  # as in validation
        found = explainer.targets(images(), list("abcd"))
    ways = explainer.teacher, Gradient(explainer.network)
    maps = [way.explain(images(), views=VIEWS, smoothing=0.1) for way in ways]
    assert_close(found, avg_pool2d(agreement(maps)[:, None], 2))
    trained(explainer, tmp_path).save_checkpoint(tmp_path / "student.ckpt")
    loaded = load_explainer(tmp_path / "student.ckpt")
    assert isinstance(loaded, Distilled)
    assert loaded.arguments() == explainer.arguments()
    assert_close(loaded.explain(images()), explainer.eval().explain(images()))
    with pytest.raises(ValueError, match=r"its teacher agrees with \['Gradient'\], which are not"):
        loaded.objective(images())
    with pytest.raises(ValueError, match=r"has the witnesses \['Gradient'\], but \[\] are given"):
        Trainer(accelerator="cpu", logger=False, max_epochs=2).fit(
            distilled(smoothing=0.1), batches(), ckpt_path=tmp_path / "student.ckpt"
        )


def test_image_and_map_are_turned_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that shows the image itself and a student that does so, too, never differ."""
    explainer, losses = distilled(views=Views(1, rotation=40.0)), list[float]()
    place = torch.arange(32) - torch.tensor([8, 12, 16, 20])[:, None]
    bells = (-((place[:, :, None] - 3) ** 2 + place[:, None] ** 2) / 50).exp()[:, None]

    def taught(image: Tensor, *_: object) -> Tensor:
        return image[:, 0]

    monkeypatch.setattr(explainer.teacher, "explain", taught)
    monkeypatch.setattr(explainer, "student", lambda image: avg_pool2d(image, 2) / explainer.scale)
    explainer.scale.fill_(float(bells.mean()))
    monkeypatch.setattr(explainer, "log", lambda _, loss: losses.append(float(loss)))
    batch = {"unturned": bells, "id": list("abcd")}
    for _ in range(5):
        explainer.training_step(batch, 0)
    assert max(losses) < 0.05
    assert (bells / bells.mean() - 1).abs().mean() > 1
    assert len(set(losses)) == 5  # another draw at each step


@pytest.mark.parametrize("features", [False, True])
def test_training_comes_near_the_teacher_and_changes_the_student_alone(
    tmp_path: Path, features: bool
) -> None:
    explainer = distilled(optimisation=Optimisation(1e-2, "constant"), features=features)
    before = {name: value.clone() for name, value in explainer.state_dict().items()}
    losses = [
        float(trained(explainer, tmp_path, epochs).callback_metrics["val/loss"])
        for epochs in (1, 10)
    ]
    assert losses[1] < 0.7 * losses[0]
    after = explainer.state_dict()
    moved = {
        name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])
    }
    assert moved == {"unet", "head", "scale"} | ({"reader", "reader_head"} if features else set())
    assert not explainer.teacher.training


def test_the_images_before_augmentation_count() -> None:
    batch = {"image": images(), "id": list("abcd")}
    kept = distilled().on_before_batch_transfer(batch, 0)
    augmented = {**kept, "image": kept["image"].flip(3)}
    assert torch.equal(augmented["unturned"], images())


@pytest.mark.parametrize(("build", "features"), [(Single, False), (Duo, False), (Single, True)])
def test_a_checkpoint_is_complete_by_itself(
    build: type[Single], features: bool, tmp_path: Path
) -> None:
    explainer = Distilled(teacher(build), VIEWS, 0.1, (4, 6), 2, features=features)
    trained(explainer, tmp_path).save_checkpoint(tmp_path / "student.ckpt")
    loaded = load_explainer(tmp_path / "student.ckpt")
    assert isinstance(loaded, Distilled)
    assert_close(loaded.explain(images()), explainer.explain(images()))
    assert_close(loaded(images()), explainer.teacher(images()))
    assert loaded.arguments() == explainer.arguments()
    file = str(save(teacher(build), tmp_path / "teacher.ckpt"))
    again = Distilled(file, VIEWS, 0.1, (4, 6), 2, features=features)
    assert again.arguments() == explainer.arguments()


def save(explainer: Single | Duo, path: Path) -> Path:
    content: dict[str, Any] = {"state_dict": explainer.state_dict()}
    explainer.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def test_a_teacher_draws_images() -> None:
    other = MaskGenerator(Network("test_resnet"), geometry=SMALL)
    with pytest.raises(ValueError, match="a teacher draws a similar and an adversarial image"):
        Distilled(other)


def computed(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Images whose maps a training in this folder computed."""
    explainer, seen = distilled(**options), list[int]()
    teach = explainer.teach
    monkeypatch.setattr(explainer, "teach", lambda image: seen.append(len(image)) or teach(image))
    trained(explainer, folder)
    return sum(seen)


def test_another_training_finds_the_maps_that_were_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witnesses: Any = {"Gradient": Gradient}
    assert computed(tmp_path, monkeypatch, witnesses=witnesses) == 12
    assert computed(tmp_path, monkeypatch, witnesses=witnesses, features=True) == 0
    assert computed(tmp_path / "new", monkeypatch, witnesses=witnesses) == 12
    shared = str(tmp_path / "new")
    assert computed(tmp_path / "third", monkeypatch, witnesses=witnesses, maps=shared) == 0
    assert computed(tmp_path, monkeypatch, witnesses=witnesses, smoothing=0.1) == 12
    assert computed(tmp_path, monkeypatch) == 12  # without the witness


def test_maps_from_a_file_are_of_the_same_values(tmp_path: Path) -> None:
    first, second = Taught(), Taught()
    first.open(tmp_path, "maps", 0)
    first.add(images(2), ["a", "b"], torch.rand(2, 1, 16, 16))
    assert second.find(images(2), ["a", "b"]) == [0, 1]
    first.write()
    second.open(tmp_path, "maps", 1)  # another process
    changed = torch.stack([images()[0], images()[0]])
    assert second.find(changed, ["a", "b"]) == [1]
    assert torch.equal(second.maps["a"], first.maps["a"])


def test_a_long_wait_writes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Taught()
    maps.open(tmp_path, "maps", 0)
    maps.add(images(1), ["a"], torch.rand(1, 1, 16, 16))
    assert maps.unwritten == 1
    monkeypatch.setattr("explainers.learned.taught.PATIENCE", -1)
    maps.add(images(1), ["b"], torch.rand(1, 1, 16, 16))
    assert set(torch.load(tmp_path / "maps-0.pt")) == {"a", "b"}


def test_a_damaged_or_unwritable_file_costs_its_maps_only(tmp_path: Path) -> None:
    (tmp_path / "maps-0.pt").write_bytes(b"half")
    maps = Taught()
    with pytest.warns(UserWarning, match=r"maps-0.pt cannot be read"):
        maps.open(tmp_path, "maps", 0)
    maps.add(images(1), ["a"], torch.rand(1, 1, 16, 16))
    maps.path = tmp_path  # a folder stands in its way
    with pytest.warns(UserWarning, match="cannot be written .* are not kept"):
        maps.write()
    assert maps.find(images(1), ["a"]) == []
