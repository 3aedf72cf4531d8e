"""A bundle as files: torch.export (.pt2) and ONNX in fp32, fp16 and int8; parity and speed."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

from explainers.inference.bundle import OUTPUTS, Answer, Bundle

Arrays = Mapping[str, NDArray[Any]]


def write_all(bundle: Bundle, validation: Sequence[Tensor], folder: Path) -> list[Path]:
    """Write model.pt2, model.onnx, model_fp16.onnx and model_int8.onnx; gives their paths.

    Args:
        bundle: On the CPU.
        validation: Batches of images for the ranges of int8.
        folder: That is there.
    """
    names = ("model.pt2", "model.onnx", "model_fp16.onnx", "model_int8.onnx")
    program, onnx_model, half, quantised = paths = [folder / name for name in names]
    write_pt2(bundle, validation[0], program)
    write_onnx(bundle, validation[0], onnx_model)
    write_half(onnx_model, half)
    write_int8(onnx_model, quantised, validation)
    for path in (onnx_model, half, quantised):
        write_names(path, bundle.network.class_names)
    return paths


def write_pt2(bundle: Bundle, image: Tensor, path: Path) -> None:
    """Write the bundle by torch.export, for batches of any size.

    Args:
        bundle: On the CPU.
        image: An example, (b, c, h, w).
        path: Ending in .pt2.
    """
    torch.export.save(exported(bundle, image), path)


def write_onnx(bundle: Bundle, image: Tensor, path: Path) -> None:
    """Write the bundle as ONNX: input "image", outputs as in `Answer`, for batches of any size."""
    program = torch.onnx.export(
        exported(bundle, image),
        (example(image),),
        input_names=["image"],
        output_names=list(OUTPUTS),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def exported(bundle: Bundle, image: Tensor) -> torch.export.ExportedProgram:
    """The bundle's graph."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            bundle.eval(), (example(image),), dynamic_shapes={"image": {0: batch}}, strict=False
        )
    gc.collect()  # tracing leaves a subclass of each module's class under the same name
    return program


def example(image: Tensor) -> Tensor:
    """Two images: a batch of one would be taken for a batch of every size one."""
    return image[:1].repeat(2, 1, 1, 1).contiguous()


def write_half(source: Path, target: Path) -> None:
    """Write an ONNX model with weights and inner values of 16 bit; input and outputs keep 32."""
    model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    onnx.save(model, target)


def write_int8(source: Path, target: Path, images: Iterable[Tensor]) -> None:
    """Write an ONNX model whose generator convolves in 8 bit, ranges taken from the images.

    The classifier keeps 32 bit: in 8 bit an EfficientNet decided 6 of 64 images otherwise (LOG.md).

    Args:
        source: fp32 model.
        target: File to write.
        images: Batches (b, c, h, w) for the ranges, from the validation split.
    """
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    convolutions = [node for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
    generator = [node.name for node in convolutions if of_generator(node.input[1])]
    quantize_static(
        str(prepared),
        str(target),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        nodes_to_quantize=generator,
    )
    prepared.unlink()


def of_generator(weight: str) -> bool:
    """Whether a weight's name is one of the generator's, which holds the classifier too."""
    return weight.startswith("generator.") and ".network." not in weight


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives batches of images to the quantisation."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(images)

    def get_next(self) -> Arrays | None:
        """The next batch, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch.numpy()}


def write_names(path: Path, class_names: Sequence[str]) -> None:
    """Keep the classes in an ONNX model too, so that no other card is taken for its own."""
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"class_names": json.dumps(list(class_names))})
    onnx.save(model, path)


def open_onnx(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """The model in onnxruntime on the CPU; 0 threads takes onnxruntime's own number.

    Raises:
        ValueError: If the file is damaged or takes values from other files, which are not opened.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = path.read_bytes()
    try:
        outside = any(map(lies_outside, tensors(onnx.load_from_string(content))))
        session = (
            None
            if outside
            else onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        )
    except Exception as error:  # of protobuf and of onnxruntime, which has its own
        raise ValueError(
            f"{path} is no ONNX model or a damaged one: {first_line(error)}."
        ) from error
    if session is None:
        raise ValueError(
            f"{path} takes values from other files, which are not opened: export it anew."
        )
    return session


def tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, wherever it stands."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                if isinstance(part, onnx.TensorProto):
                    yield part
                else:
                    yield from tensors(part)


def lies_outside(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values lie in another file."""
    return bool(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL)


def first_line(error: Exception) -> str:
    """Of what an error says, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def check_form(
    session: onnxruntime.InferenceSession,
    path: Path,
    channels: int,
    size: int,
    class_names: Sequence[str],
) -> None:
    """Raise ValueError where a model is not what its card tells."""
    shapes = {one.name: one.shape[1:] for one in session.get_inputs()}
    known = session.get_modelmeta().custom_metadata_map.get("class_names")
    outputs = [one.name for one in session.get_outputs()]
    if shapes != {"image": [channels, size, size]} or outputs != list(OUTPUTS):
        raise ValueError(f"{path} does not read and say what its card tells: export it anew.")
    if known not in (None, json.dumps(list(class_names))):
        raise ValueError(
            f"{path} decides between {known}, but its card tells {list(class_names)}: give the "
            "card that was exported with it."
        )


def check_answer(answer: Answer, image: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError where a model's answer has not the form of an `Answer`."""
    count, classes = len(image), len(class_names)
    shapes = [(count, classes), (count,), image.shape, image.shape, image[:, 0].shape]
    found = [tuple(part.shape) for part in answer]
    if found != [tuple(shape) for shape in shapes]:
        raise ValueError(f"the model's answer has the shapes {found}, {shapes} are needed.")
    if not ((answer.decision >= 0) & (answer.decision < classes)).all():
        raise ValueError(f"the model decides {answer.decision.tolist()} of {classes} classes.")


def run(session: onnxruntime.InferenceSession, image: Tensor) -> Answer:
    """Answer of an ONNX model; a ValueError where it fails on the image."""
    try:
        found = session.run(list(OUTPUTS), {"image": image.numpy()})
    except Exception as error:  # onnxruntime has errors of its own
        raise ValueError(f"the model fails on the image: {first_line(error)}.") from error
    return Answer(*map(torch.from_numpy, found))


def largest_difference(one: Answer, two: Answer) -> dict[str, float]:
    """Largest difference of every output; of the decisions the number that differ."""
    differ = {
        name: float((a.double() - b.double()).abs().max())
        for name, a, b in zip(OUTPUTS, one, two, strict=True)
    }
    return {**differ, "decision": float((one.decision != two.decision).sum())}


def seconds(call: Any, image: Tensor, repeats: int = 10) -> float:
    """Median seconds of a call, after two for warmth."""
    times = []
    for _ in range(repeats + 2):
        start = perf_counter()
        call(image)
        times.append(perf_counter() - start)
    return median(times[2:])
