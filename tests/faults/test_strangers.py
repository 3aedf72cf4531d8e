"""Checkpoints and exported models from strangers: nothing of them runs, one sentence says no."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import networks  # noqa: F401  the backbone of the kept checkpoints
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from classifiers import load_network
from classifiers.network import read_checkpoint
from datamodules import Phantom
from datamodules.base import Loading
from explainers import load_explainer
from explainers.__main__ import opened_model
from explainers.attribution import Gradient
from explainers.inference import Bundle, export
from explainers.learned import Single

pytestmark = pytest.mark.faults
KEPT = Path(__file__).parents[1] / "fixtures" / "checkpoints"
NOW = KEPT / "0.1.0"
KINDS = ("classifier", "single", "duo", "adversarial", "mask", "syce", "distilled")
Tell = Callable[[str, int, int], None]


class Evil:
    """What a pickle would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def load(path: Path) -> object:
    """As whoever gets the file would."""
    content = read_checkpoint(path)
    return load_explainer(path) if "explainer" in content else load_network(path)


def refusal(call: Callable[[], object]) -> str | None:
    """The sentence with which a call refuses; None where it does not."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def is_sentence(text: str) -> bool:
    return "\n" not in text and "\x1b" not in text and text.endswith(".") and len(text) < 800


@pytest.mark.parametrize("folder", sorted(path for path in KEPT.iterdir() if path.is_dir()))
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_every_release_load_and_give_the_same_map(
    kind: str, folder: Path, tell_fault: Tell
) -> None:
    kept = np.load(folder / "maps.npz")
    image = torch.from_numpy(kept["image"])
    path = folder / f"{kind}.ckpt"
    assert path.stat().st_size < 60_000
    explainer = Gradient(load_network(path)) if kind == "classifier" else load_explainer(path)
    difference = np.abs(explainer.explain(image).numpy() - kept[kind]).max()
    tell_fault("checkpoint of an earlier release", 1, int(difference <= 1e-5))
    assert difference <= 1e-5
    assert kept[kind].std() > 1e-3


def pickled(evil: Evil, path: Path) -> None:
    path.write_bytes(pickle.dumps({"network": evil, "state_dict": {}}))


def saved(evil: Evil, path: Path) -> None:
    torch.save({**read_checkpoint(NOW / "single.ckpt"), "callbacks": evil}, path)


def legacy(evil: Evil, path: Path) -> None:
    torch.save({"state_dict": evil}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [pickled, saved, legacy])
def test_code_in_a_checkpoint_never_runs(
    write: Callable[[Evil, Path], None], tmp_path: Path, tell_fault: Tell
) -> None:
    marker = tmp_path / "ran"
    write(Evil(marker), tmp_path / "x.ckpt")
    if write is pickled:
        pickle.loads((tmp_path / "x.ckpt").read_bytes())
    else:
        torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert marker.exists()  # the bait bites where nobody minds
    marker.unlink()
    told = [refusal(lambda one=one: one(tmp_path / "x.ckpt")) for one in (load, load_explainer)]  # type: ignore[misc]
    tell_fault("code in a checkpoint", 1, int(not marker.exists()))
    assert not marker.exists()
    assert all(text and is_sentence(text) and "nothing of it was executed" in text for text in told)


def changed(change: Callable[[dict[str, Any]], object], path: Path, kind: str = "single") -> Path:
    content = copy.deepcopy(dict(read_checkpoint(NOW / f"{kind}.ckpt")))
    change(content)
    torch.save(content, path)
    return path


def setting(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


WEIGHT = ("state_dict", "network.backbone.head.weight")
ARGUMENTS = ("explainer", "arguments")
GEOMETRY = (*ARGUMENTS, "geometry")
ABSURD = {
    "another class": (setting("explainer", "class", value="Popen"), "holds none of"),
    "class no text": (setting("explainer", "class", value=["Single"]), "holds none of"),
    "no arguments": (lambda c: c["explainer"].pop("arguments"), "cannot be rebuilt: 'arguments'"),
    "of the future": (setting(*ARGUMENTS, "depth", value=3), "unexpected keyword argument 'depth'"),
    "no network": (lambda c: c.pop("network"), "holds no network"),
    "no weights": (lambda c: c.pop("state_dict"), "holds no network"),
    "missing weight": (lambda c: c["state_dict"].pop(WEIGHT[1]), "'head.weight'|is missing"),
    "wrong shape": (setting(*WEIGHT, value=torch.zeros(3, 4)), r"has the shape \(3, 4\)"),
    "no tensor": (setting(*WEIGHT, value=[0.0]), "is not a plain tensor"),
    "stretched": (setting(*WEIGHT, value=torch.zeros(1).expand(9**9, 9**9)), "is not a plain"),
    "meta": (setting(*WEIGHT, value=torch.empty(9**9, device="meta")), "is not a plain tensor"),
    "sparse": (setting(*WEIGHT, value=torch.eye(4).to_sparse()), "is not a plain tensor"),
    "names no texts": (setting("network", "class_names", value=[1, 2]), "must be two or more"),
    "names twice": (setting("network", "class_names", value=["a", "a"]), "must be two or more"),
    "no names": (setting("network", "class_names", value=[]), "must be two or more texts"),
    "backbone no text": (setting("network", "backbone", value=7), "names no backbone, but 7"),
    "a billion logits": (setting("network", "num_logits", value=10**9), "names are needed"),
    "threshold": (setting("network", "threshold", value="0.5"), "cannot be rebuilt"),
    "wide": (setting(*GEOMETRY, "widths", value=[10**9, 10**9]), "cannot be rebuilt"),
    "wider": (setting(*GEOMETRY, "widths", value=[10**5, 10**5]), "cannot be rebuilt"),
    "deep": (setting(*GEOMETRY, "widths", value=[1] * 10**6), "more than the file's"),
    "long": (setting(*ARGUMENTS, "convolutions", value=10**9), "more than the file's"),
    "fetched": (setting(*GEOMETRY, "unet", value="tu-hf-hub:a/b"), "not of this machine"),
    "module": (setting("network", "backbone", value="this.s"), "no file may import by itself"),
    "function": (setting("network", "backbone", value="os.system"), "no file may import"),
    "no classifier": (setting("network", "backbone", value="torch.nn.Linear"), "cannot be rebuilt"),
    "enormous": (setting("network", "backbone", value="vit_giant_patch14_224"), "rebuilt"),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_content_is_refused_in_one_sentence(
    name: str, tmp_path: Path, tell_fault: Tell
) -> None:
    change, reason = ABSURD[name]
    told = refusal(lambda: load(changed(change, tmp_path / "x.ckpt")))  # type: ignore[arg-type]
    tell_fault("absurd content of a checkpoint", 1, int(bool(told)))
    assert told
    assert is_sentence(told), told
    with pytest.raises(ValueError, match=reason):
        raise ValueError(told)


def test_a_file_imports_a_class_only_where_the_user_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell_fault: Tell
) -> None:
    """Not the class alone: importing its module would run it."""
    (tmp_path / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom networks import Tiny as Model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(setting("network", "backbone", value="theirs.Model"), tmp_path / "x.ckpt")
    told = refusal(lambda: load(path))
    tell_fault("class named by a checkpoint", 1, int(not (tmp_path / "ran").exists()))
    assert not (tmp_path / "ran").exists()
    assert told
    assert "set SIMADV_TRUST=theirs.Model" in told
    monkeypatch.setenv("SIMADV_TRUST", "other.Model,theirs.Model")
    assert isinstance(load(path), Single)
    monkeypatch.delenv("SIMADV_TRUST")
    assert isinstance(load(path), Single)  # it has been imported now


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Some bytes otherwise, the end cut off, or a stretch doubled or missing."""
    changed, at = bytearray(content), rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + rng.randint(1, 64)]
        case 3:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
    return bytes(changed)


def repacked(content: bytes, rng: random.Random, path: Path) -> bytes:
    """The pickle inside otherwise, sums right: what a stranger could write."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    pickle_name = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickle_name] = flipped(parts[pickle_name], rng)
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part)
    return path.read_bytes()


VALUES = [None, -1, 0, 10**12, 1e308, float("nan"), "", "x" * 99, [], {}, [[]], True, b"x"]


def twisted(value: Any, rng: random.Random) -> Any:
    """One leaf of plain values replaced, or one key left out."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
        twisted(value[key], rng)
    elif rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice(VALUES)
    return value


def mutants(count: int, folder: Path) -> Iterator[Path]:
    """Checkpoints that are damaged: in their bytes, in their pickle, in what they hold."""
    rng = random.Random(0)
    for k in range(count):
        kind, path = rng.choice(KINDS), folder / f"{k}.ckpt"
        content = (NOW / f"{kind}.ckpt").read_bytes()
        if k % 3 == 0:
            path.write_bytes(flipped(content, rng))
        elif k % 3 == 1:
            path.write_bytes(repacked(content, rng, path))
        else:
            held = dict(read_checkpoint(NOW / f"{kind}.ckpt"))
            held["state_dict"] = dict(held["state_dict"])
            part = rng.choice([part for part in ("network", "explainer") if part in held])
            held[part] = twisted(copy.deepcopy(held[part]), rng)
            torch.save(held, path)
        yield path
        path.unlink()


SHARES = [pytest.param(40), pytest.param(300, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", SHARES)
def test_mutated_checkpoints_load_or_are_refused(
    count: int, tmp_path: Path, tell_fault: Tell
) -> None:
    lost, refused = [], 0
    for path in mutants(count, tmp_path):
        try:
            told = refusal(lambda path=path: load(path))  # type: ignore[misc]
        except Exception as error:
            told = f"{type(error).__name__}\n{error}"
        refused += told is not None
        if told is not None and not is_sentence(told):
            lost.append(told)
    tell_fault("mutated checkpoint", count, count - len(lost))
    assert lost == []
    assert refused > count / 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an exported model.onnx, model.pt2 and their card."""
    folder = tmp_path_factory.mktemp("exported")
    explainer = load_explainer(NOW / "single.ckpt")
    bundle, image = Bundle(explainer.network, explainer, (16, 16)), torch.rand(2, 1, 16, 16)
    export.write_onnx(bundle, image, folder / "model.onnx")
    export.write_names(folder / "model.onnx", explainer.network.class_names)
    export.write_pt2(bundle, image, folder / "model.pt2")
    write_card(folder)
    return folder


def write_card(folder: Path, **changes: object) -> None:
    """As the export does, of whatever lies in the folder."""
    sums = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("model.*")}
    names = {"class_names": ["healthy", "opacity"]}
    card = {"input": {"shape": ["batch", 1, 16, 16]}, "classifier": names, "sha256": sums}
    (folder / "card.json").write_text(json.dumps(card | changes))


def answered(folder: Path, name: str = "model.onnx") -> object:
    return opened_model(str(folder / name), None, None, 0.0, "cpu").answer(torch.rand(2, 1, 16, 16))


def test_an_exported_model_answers(exported: Path) -> None:
    assert answered(exported)


def elsewhere(folder: Path, place: str) -> None:
    """Let the values of the largest weight lie in another file."""
    model = onnx.load(folder / "model.onnx")
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = weight.raw_data
    (folder.parent / "secret.bin").write_bytes(values)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", place
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("place", ["../secret.bin", "{}/secret.bin", "link", "inside.bin"])
def test_values_of_other_files_are_not_opened(
    place: str, exported: Path, tmp_path: Path, tell_fault: Tell
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    elsewhere(folder, place.format(tmp_path))
    (folder / "link").symlink_to(tmp_path / "secret.bin")
    shutil.copy(tmp_path / "secret.bin", folder / "inside.bin")
    write_card(folder)
    told = refusal(lambda: answered(folder))
    tell_fault("ONNX with values elsewhere", 1, int(bool(told and "which are not opened" in told)))
    assert told
    assert "takes values from other files, which are not opened" in told


def test_a_program_is_loaded_only_where_the_user_trusts_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tell_fault: Tell
) -> None:
    def never(path: Path) -> None:
        raise AssertionError(f"{path} was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "load", never)
        told = refusal(lambda: answered(exported, "model.pt2"))
    tell_fault(".pt2 of a stranger", 1, int(bool(told)))
    assert told
    assert f"set SIMADV_TRUST={exported / 'model.pt2'}" in told
    monkeypatch.setenv("SIMADV_TRUST", str(exported / "model.pt2"))
    assert answered(exported, "model.pt2")


def test_a_card_of_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    write_card(folder, classifier={"class_names": ["opacity", "healthy"]})
    with pytest.raises(ValueError, match=r'decides between \["healthy", "opacity"\], but its card'):
        answered(folder)
    write_card(folder, input={"shape": ["batch", 1, 10**9, 10**9]})
    with pytest.raises(ValueError, match="does not read and say what its card tells"):
        answered(folder)
    write_card(folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"model.onnx is not the file that .*card.json tells of"):
        answered(folder)


def test_an_answer_of_another_form_is_refused(exported: Path, tmp_path: Path) -> None:
    """A model whose decision is class 7 of two."""
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        node.output[:] = ["plain" if name == "decision" else name for name in node.output]
    seven = onnx.helper.make_tensor("seven", TensorProto.INT64, [], [7])
    model.graph.initializer.append(seven)
    model.graph.node.append(onnx.helper.make_node("Add", ["plain", "seven"], ["decision"]))
    onnx.save(model, folder / "model.onnx")
    write_card(folder)
    with pytest.raises(ValueError, match=r"the model decides \[[78], [78]\] of 2 classes"):
        answered(folder)


def mutated_exports(count: int, exported: Path, folder: Path) -> Iterator[Path]:
    """A damaged card, or a damaged model with a card that vouches for it."""
    rng = random.Random(1)
    for k in range(count):
        path = Path(shutil.copytree(exported, folder / str(k)))
        if k % 2:
            name = path / "model.onnx"
            name.write_bytes(flipped(name.read_bytes(), rng))
            write_card(path)
        elif k % 4:
            (path / "card.json").write_bytes(flipped((path / "card.json").read_bytes(), rng))
        else:
            card = json.loads((path / "card.json").read_text())
            plain = {key: value for key, value in card.items() if key != "sha256"}
            held = {**card, **twisted(plain, rng)}
            (path / "card.json").write_text(json.dumps(held, default=str))
        yield path
        shutil.rmtree(path)


@pytest.mark.parametrize("count", SHARES)
def test_mutated_exports_answer_or_are_refused(
    count: int, exported: Path, tmp_path: Path, tell_fault: Tell
) -> None:
    lost, refused = [], 0
    for path in mutated_exports(count, exported, tmp_path):
        try:
            told = refusal(lambda path=path: answered(path))  # type: ignore[misc]
        except Exception as error:
            told = f"{type(error).__name__}\n{error}"
        refused += told is not None
        if told is not None and not is_sentence(told):
            lost.append(told)
    tell_fault("mutated export", count, count - len(lost))
    assert lost == []
    assert refused > count / 3


def test_swapped_class_names_are_told_by_the_data(tmp_path: Path) -> None:
    names = ["opacity", "healthy"]
    path = changed(setting("network", "class_names", value=names), tmp_path / "x.ckpt")
    explainer = load_explainer(path)
    explainer.trainer = type("T", (), {"datamodule": Phantom(loading=Loading(size=16))})()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="was trained on classes"):
        explainer.setup("fit")
