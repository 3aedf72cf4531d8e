"""Take an explainer out of the lab: ``python -m explainers export``, ``explain``, ``serve``."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
import wandb
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn.functional import interpolate

from classifiers.network import is_trusted
from datamodules.base import ImageDataModule
from explainers.batches import halving, limit_memory
from explainers.command import plainly
from explainers.evaluation.metrics.localisation import average_precision
from explainers.learned import load_explainer
from explainers.learned.base import OnePass
from explainers.tracking import artifact_names, declare_inputs, log_files, wandb_mode
from explainers.views import Views

TOLERANCE = 1e-4  # of a map against the checkpoint's
EXACT = ("model.pt2", "model.onnx")  # the others trade exactness for size and speed
BATCH = 8
SHOWN = 768  # longest side of a picture on the served page, pixels


def export(
    checkpoint: str,
    data: ImageDataModule,
    out: str = "runs/export",
    views: Views | None = None,
    smoothing: float = 0.0,
    images: int = 64,
    logging: Literal["off", "wandb"] = "off",
) -> None:
    """Write a learned explainer with its classifier as .pt2 and ONNX (fp32, fp16, int8).

    Writes model.pt2, model.onnx, model_fp16.onnx, model_int8.onnx, card.json and card.md. All of
    them answer with probability, decision, similar, adversarial and map for images (b, c, h, w) in
    [0, 1] of the size of the data, in batches of any size.

    Args:
        checkpoint: Of a Single, Duo, Adversarial or Distilled.
        data: Test images for parity and speed; validation images for the ranges of int8 and for
            what 16 and 8 bit cost in localisation.
        out: Folder that everything is written to.
        views: Geometric views that the map is averaged over; none by default.
        smoothing: Sigma of a Gaussian over the map, share of the image side; 0 is off.
        images: Most images of either split that are looked at.
        logging: wandb keeps the files as an artifact of a run, offline without a key.

    Raises:
        ValueError: If the explainer cannot be exported.
        RuntimeError: If an exported model does not give the checkpoint's maps or decisions.
    """
    from explainers.inference import Answer, Bundle, card
    from explainers.inference import export as files

    explainer = exportable(checkpoint)
    data.prepare_data()
    data.setup()
    size, folder = data.loading.size, Path(out)
    part = folder / "part"  # until all is written: what an earlier export left stays good
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    bundle = Bundle(explainer.network, explainer, (size, size), views, smoothing).eval()
    tested, validation = gathered(data, "test", images), gathered(data, "val", images)
    paths = files.write_all(bundle, validation["image"].split(BATCH), part)

    def own(image: Tensor) -> Answer:
        with torch.no_grad():
            answer = Answer(*bundle(image))
        return answer._replace(map=explainer.explain(image, views=views, smoothing=smoothing))

    expected = answers(own, tested["image"])
    calls = {"checkpoint": own, **{path.name: runner(path) for path in paths}}
    measured = {
        name: measure(call, expected, tested["image"], validation) for name, call in calls.items()
    }
    for name, told in measured.items():
        print(
            f"{name}: largest difference of the map {told['largest_difference_of_map']:.2g}, "
            f"decisions that differ {told['decisions_that_differ']:.0f} of {len(expected.map)}, "
            f"validation average precision {told['validation_average_precision']:.3f}, "
            f"{told['seconds_per_image']:.4f} s an image"
        )
    for name in EXACT:
        check_parity(part / name, **measured[name])
    facts = {
        "data": {"module": type(data).__name__, "validation": len(validation["image"])},
        "input": {"shape": ["batch", explainer.geometry.channels, size, size], "range": [0, 1]},
        "outputs": list(Answer._fields),
        "views": asdict(views) if views else {},
        "smoothing": smoothing,
        "sha256": {path.name: digest(path) for path in paths},
        **{key: {k: v[key] for k, v in measured.items()} for key in measured["checkpoint"]},
    }
    generator = {"class": type(explainer).__name__, **explainer.arguments()}
    content = card.card(Path(checkpoint), explainer.network.recipe, generator, facts)
    (folder / "card.json").unlink(missing_ok=True)  # no model is used without its card
    left = [path.replace(folder / path.name) for path in paths]
    part.rmdir()
    card.write_card(json.loads(json.dumps(content)), folder)
    if logging == "wandb":
        left += [folder / "card.json", folder / "card.md"]
        inputs = artifact_names([checkpoint])
        with wandb.init(project="simadv", name=folder.name, dir=out, mode=wandb_mode()) as run:
            declare_inputs(run, inputs)
            log_files(run, folder.name, "exported-model", left)


def measure(
    call: Callable[[Tensor], Any], expected: Any, images: Tensor, validation: dict[str, Tensor]
) -> dict[str, float]:
    """How a model's answers differ from the checkpoint's, how well it localises, how long it takes.

    Args:
        call: The model.
        expected: The checkpoint's answer for the images.
        images: Of the parity; the first is timed.
        validation: Images with masks.
    """
    from explainers.inference import export as files

    parity = files.largest_difference(expected, answers(call, images))
    maps = answers(call, validation["image"]).map
    return {
        "largest_difference_of_map": parity["map"],
        "decisions_that_differ": parity["decision"],
        "validation_average_precision": float(
            average_precision(maps, validation["mask"]).nanmean()
        ),
        "seconds_per_image": files.seconds(call, images[:1]),
    }


def check_parity(
    path: Path, largest_difference_of_map: float, decisions_that_differ: float, **_: float
) -> None:
    """Raise RuntimeError where an exported model does not answer as the checkpoint."""
    if largest_difference_of_map > TOLERANCE or decisions_that_differ:
        raise RuntimeError(
            f"{path} differs from the checkpoint: map by {largest_difference_of_map:.2g} (at most "
            f"{TOLERANCE}), {decisions_that_differ:.0f} decisions; do not use it."
        )


def explain(
    model: str,
    inputs: list[str],
    out: str = "runs/explained",
    size: int | None = None,
    views: Views | None = None,
    smoothing: float = 0.0,
    batch_size: int = BATCH,
    percentile: float = 95.0,
    accelerator: str = "auto",
    devices: int = 1,
    workers: int = 0,
    keep_maps: bool = False,
    memory_megabytes: int | None = None,
) -> list[dict[str, str]]:
    """Explain image files by a checkpoint or an exported model; goes on where it was stopped.

    Writes an overlay (PNG) and the map (NPY, at the picture's own size) of every picture, for DICOM
    also a Secondary Capture and a Segmentation, and results.csv: decision, probabilities, peak and
    regions. Of tar shards, an archive too large for that, it writes one Parquet file of rows each.
    What cannot be read is told there and at the end.

    Args:
        model: Checkpoint of a Single, Duo, Adversarial or Distilled, or an exported model (.onnx,
            .pt2) with its card.json. A .pt2 file is a program: SIMADV_TRUST has to name it.
        inputs: PNG, JPEG, TIFF, DICOM files, folders, patterns, CSV tables with a column image; or
            tar shards of WebDataset's form: files, patterns ("a/*.tar", "a/{000..123}.tar"), URLs.
        out: Folder that everything is written to.
        size: Side that a checkpoint was trained on, pixels; taken from the config.yaml beside it.
        views: Of a checkpoint: geometric views to average over.
        smoothing: Of a checkpoint: sigma of a Gaussian over the map, share of the image side.
        batch_size: Pictures at a time.
        percentile: Of the map's values, above which a region is told.
        accelerator: Where a checkpoint runs.
        devices: Batches side by side, on GPUs each on its own.
        workers: Of shards: processes that read them; 0 reads in this one.
        keep_maps: Of shards: write the maps too, float16 at the model's size.
        memory_megabytes: Most memory of this process, or of a GPU, of a checkpoint; batches are
            halved until they fit.

    Returns:
        Lines of the pictures that could not be read, or whose DICOM objects could not be written.

    Raises:
        ValueError: If the model, an input or an option cannot be used.
    """
    shards = [text.startswith("pipe:") or text.endswith(".tar") for text in inputs]
    if any(shards) and not all(shards):
        raise ValueError("tar shards and files cannot be explained at once: make two calls.")
    if not any(shards) and (workers or keep_maps):
        raise ValueError("workers and keep_maps are for tar shards: leave them.")
    if any(shards) and (find_spec("webdataset") is None or find_spec("pyarrow") is None):
        raise ValueError("tar shards need the extra archive: python -m pip install '.[archive]'.")
    opened = opened_model(model, size, views, smoothing, accelerator, devices, drawn=False)
    if memory_megabytes is not None:
        kind = Fabric(accelerator=accelerator, devices=1).device.type
        for k in range(devices):
            limit_memory(memory_megabytes, torch.device(kind, k))
    if not any(shards):
        from explainers.inference.explain import explain_files

        return explain_files(opened, inputs, Path(out), batch_size, percentile, devices)
    from explainers.inference.archive import explain_shards

    return explain_shards(
        opened, inputs, Path(out), batch_size, percentile, workers, keep_maps, devices
    )


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    size: int | None = None,
    views: Views | None = None,
    smoothing: float = 0.0,
    accelerator: str = "auto",
    megabytes: float = 64.0,
) -> None:
    """Open a local page on which one drops an image or DICOM file and explores its map.

    Args:
        model: As in explain.
        host: Address to listen at: this machine alone by default. There is no password: whoever
            reaches another address may explain.
        port: Of the page.
        size: As in explain.
        views: As in explain.
        smoothing: As in explain.
        accelerator: As in explain.
        megabytes: Largest file.

    Raises:
        ValueError: If the model or the address cannot be used, or the extra is missing.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError("serve needs the extra serve: python -m pip install '.[serve]'.")
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(
            f"host {host!r} is every address of this machine: give the one, or the name, by which "
            "others reach it."
        )
    import uvicorn

    from explainers.inference.serve import LOCAL

    opened = opened_model(model, size, views, smoothing, accelerator)
    title = f"{Path(model).name}: {', '.join(opened.class_names)}"
    app = page_of(opened, title, int(megabytes * 2**20), (*LOCAL, host))
    print(f"http://{host}:{port} explains; Ctrl-C ends it.")
    uvicorn.run(app, host=host, port=port, log_level="warning")


def page_of(model: Any, title: str, limit: int, hosts: tuple[str, ...]) -> Any:
    """The served page of a model."""
    from datamodules.images import read_image, resize_image
    from explainers.evaluation import explorer
    from explainers.evaluation.metrics import set_range
    from explainers.inference.serve import application

    def explained(path: Path, frame: int | None) -> dict[str, Any]:
        image = read_image(path, model.channels, frame)
        answer = model.answer(resize_image(image, model.size)[None])
        shown = shrunk(image, SHOWN)
        similar, adversarial, heat = (
            interpolate(one, shown.shape[1:], mode="bilinear")[0]
            for one in (answer.similar, answer.adversarial, answer.map[:, None])
        )
        shares = zip(model.class_names, answer.probability[0].tolist(), strict=True)
        facts = {"decision": model.class_names[int(answer.decision[0])]}
        facts |= {f"p({name})": f"{share:.3f}" for name, share in shares}
        pair = similar.expand(3, -1, -1), adversarial.expand(3, -1, -1)
        case = explorer.Case(
            "", facts, shown.expand(3, -1, -1), None, {"map": heat[0]}, {"map": pair}
        )
        ranges = [set_range([heat])]
        return {"facts": facts, "data": explorer.content_of(case), "ranges": ranges}

    index = {"methods": ["map"], "ranges": [[0, 1]], "cases": []}
    return application(explained, explorer.section(index), title, limit, hosts)


def shrunk(image: Tensor, side: int) -> Tensor:
    """An image (c, h, w) whose longer side is at most ``side`` pixels."""
    scale = min(1.0, side / max(image.shape[1:]))
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def opened_model(
    model: str,
    size: int | None,
    views: Views | None,
    smoothing: float,
    accelerator: str,
    devices: int = 1,
    drawn: bool = True,
) -> Any:
    """A checkpoint or an exported file as what answers; with ``drawn`` with the drawn images."""
    if Path(model).suffix not in (".onnx", ".pt2"):
        return checkpoint_model(Path(model), size, views, smoothing, accelerator, devices, drawn)
    if size or views or smoothing:
        raise ValueError("an exported model has its own size, views and smoothing: leave them.")
    return exported_model(Path(model))


def exported_model(path: Path) -> Any:
    """An exported file and the card beside it."""
    from explainers.inference import Answer, card
    from explainers.inference import export as files
    from explainers.inference.explain import Model

    told = card.read_card(path)
    if path.suffix == ".pt2" and not is_trusted(str(path)):
        raise ValueError(
            f"{path} is a program, which may do anything: give the model.onnx beside it, or, if "
            f"you trust who exported it, set SIMADV_TRUST={path}."
        )
    call = runner(path)
    if path.suffix == ".onnx":
        files.check_form(call.args[0], path, *told)

    def answer(image: Tensor) -> Answer:
        found: Answer = call(image)
        files.check_answer(found, image, told.class_names)
        return found

    return Model(answer, told.size, told.channels, told.class_names, digest(path))


def checkpoint_model(
    path: Path,
    size: int | None,
    views: Views | None,
    smoothing: float,
    accelerator: str,
    devices: int,
    drawn: bool,
) -> Any:
    """A checkpoint as what answers."""
    from explainers.inference import Answer, Bundle, Explanation
    from explainers.inference.explain import Model

    explainer = exportable(str(path))
    config = path.with_name("config.yaml")
    try:
        size = size or yaml.safe_load(config.read_text())["data"]["init_args"]["loading"]["size"]
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config} tells no size: give that which {path} was trained on."
        ) from error
    kind = Fabric(accelerator=accelerator, devices=1).device.type
    if devices < 1 or (kind == "cuda" and devices > torch.cuda.device_count()):
        most = f" to {torch.cuda.device_count()}" if kind == "cuda" else " or more"
        raise ValueError(f"devices must be 1{most}, but got {devices}.")
    bundle = Bundle(explainer.network, explainer, (size, size), views, smoothing)
    free: SimpleQueue[tuple[Bundle, torch.device]] = SimpleQueue()
    for k in range(devices):
        place = torch.device(kind, k) if kind == "cuda" else torch.device(kind)
        free.put((copy.deepcopy(bundle).to(place), place))

    def answer(image: Tensor) -> Answer | Explanation:
        bundle, place = free.get()
        call, form = (bundle, Answer) if drawn else (bundle.explained, Explanation)

        def run(size: int) -> Answer | Explanation:
            with torch.no_grad():
                parts = [call(part.to(place)) for part in image.split(size)]
            return form(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))

        try:
            return halving(run, len(image))
        finally:
            free.put((bundle, place))

    settings = json.dumps([digest(path), size, asdict(views) if views else None, smoothing])
    names = explainer.network.class_names
    return Model(answer, size, explainer.geometry.channels, names, settings)


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exportable(checkpoint: str) -> OnePass:
    """A learned explainer that answers without looking anything up."""
    explainer = load_explainer(checkpoint).cpu().eval()
    if not isinstance(explainer, OnePass):
        raise ValueError(
            f"{type(explainer).__name__} cannot be exported: it needs the classifier's decision "
            "to choose a generator; export a Single, Duo, Adversarial or Distilled."
        )
    return explainer


def gathered(data: ImageDataModule, split: Any, images: int) -> dict[str, Tensor]:
    """The first images of a split and their masks."""
    parts: list[Any] = []
    for batch in data.loader(split):
        parts.append(batch)
        if sum(len(part["image"]) for part in parts) >= images:
            break
    return {key: torch.cat([part[key] for part in parts])[:images] for key in ("image", "mask")}


def runner(path: Path) -> Any:
    """The answers of an exported file."""
    from explainers.inference import Answer
    from explainers.inference import export as files

    if path.suffix == ".pt2":
        program = torch.no_grad()(torch.export.load(path).module())
        return lambda image: Answer(*program(image))
    return partial(files.run, files.open_onnx(path, torch.get_num_threads()))


def answers(call: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Answer for many images, a few at a time."""
    parts = [call(part) for part in images.split(BATCH)]
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="python -m explainers", description=__doc__)
    commands = parser.add_subcommands()
    exporting = ArgumentParser(description=export.__doc__)
    kinds = "Single, Duo, Adversarial or Distilled"
    exporting.add_argument("checkpoint", help=f"checkpoint of a {kinds}")
    exporting.add_function_arguments(export, skip={"checkpoint"}, sub_configs=True)
    commands.add_subcommand("export", exporting)
    explaining = ArgumentParser(description=explain.__doc__)
    explaining.add_argument("model", help="checkpoint, or model.onnx with its card.json")
    explaining.add_argument("inputs", nargs="+", help="files, folders, patterns or CSV tables")
    explaining.add_argument("-o", "--out", default="runs/explained", help="folder to write to")
    explaining.add_function_arguments(explain, skip={"model", "inputs", "out"})
    commands.add_subcommand("explain", explaining)
    serving = ArgumentParser(description=serve.__doc__)
    serving.add_argument("model", help="checkpoint, or model.onnx with its card.json")
    serving.add_function_arguments(serve, skip={"model"})
    commands.add_subcommand("serve", serving)
    parsed = parser.instantiate(parser.parse_args(arguments))
    if parsed.subcommand == "export":
        export(**vars(parsed.export))
    elif parsed.subcommand == "serve":
        serve(**vars(parsed.serve))
    elif failed := explain(**vars(parsed.explain)):
        for row in failed:
            print(row["error"])
        sys.exit(f"{len(failed)} picture(s) could not be read or fully written; the others are.")


if __name__ == "__main__":
    with plainly():
        main()
