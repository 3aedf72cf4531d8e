"""Work cut into batches that fit into memory."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")
RESERVE = 64 * 2**20  # for what else takes memory meanwhile, such as libraries' pages


def halving(run: Callable[[int], T], work_batch: int) -> T:
    """Result of ``run``, whose batch is halved with a warning where memory runs out.

    Args:
        run: Gets the most that may be worked on at once.
        work_batch: To begin with.
    """
    while True:
        try:
            if Budget.bytes is None:
                return run(work_batch)
            with Budget():  # type: ignore[no-untyped-call]
                return run(work_batch)
        except RuntimeError as error:
            if work_batch == 1 or not out_of_memory(error):
                raise
        work_batch //= 2
        warnings.warn(f"out of memory: going on with batches of {work_batch}.", stacklevel=2)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    words = "not enough memory", "can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def peak_memory(device: torch.device, *, reset: bool = False) -> float:
    """Peak memory in bytes: of the GPU, or of this process on Linux; NaN elsewhere."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * _kilobytes(status)["VmHWM"]


def _kilobytes(status: Path) -> dict[str, float]:
    """Sizes of a process's memory by their names, VmRSS and others."""
    lines = (line.partition(":") for line in status.read_text().splitlines())
    return {name: float(text.split()[0]) for name, _, text in lines if name.startswith("Vm")}


class Budget(TorchDispatchMode):
    """Lets memory run out where the next operation on a CPU would exceed the budget.

    A limit of the system's own makes libraries crash whose small allocations fail. An operation is
    taken to need as much as its inputs, a convolution twice its output too: oneDNN may keep it in a
    layout of its own and convert it.
    """

    bytes: float | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation if there is room."""
        assert self.bytes is not None
        needed = size_of(args)
        if func is torch.ops.aten.convolution.default:
            needed += 2 * size_of(func(*tree_map_only(Tensor, on_meta, args), **(kwargs or {})))
        if resident() + needed > self.bytes:
            if hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed counts until then
            if resident() + needed > self.bytes:
                raise torch.OutOfMemoryError(
                    f"not enough memory: {func} would exceed memory_megabytes; raise it."
                )
        return func(*args, **(kwargs or {}))


def on_meta(tensor: Tensor) -> Tensor:
    """What has its shape and no values."""
    return torch.empty_like(tensor, device="meta")


def size_of(values: object) -> int:
    """Bytes of all tensors in nested sequences."""
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def resident() -> float:
    """Bytes that this process has in memory."""
    return 1024 * _kilobytes(Path("/proc/self/status"))["VmRSS"]


def limit_memory(megabytes: int, device: torch.device) -> None:
    """Let memory run out at a budget, from now on: batches are then halved until they fit.

    Args:
        megabytes: Most of what this process may have in use where it works in batches: on a GPU
            what it allocates there, else its resident memory.
        device: Where the work is done.

    Raises:
        ValueError: If so much is in use already.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu:
        import torch._dynamo  # 100 megabytes, which the first use of a mode would import
    least = torch.cuda.memory_allocated(device) if on_gpu else resident() + RESERVE
    if megabytes * 2**20 <= least:
        raise ValueError(
            f"memory_megabytes must be above the {least / 2**20:.0f} that are needed before the "
            f"work begins, but got {megabytes}."
        )
    if on_gpu:
        share = megabytes * 2**20 / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    else:
        Budget.bytes = megabytes * 2**20 - RESERVE


def in_parts(
    run: Callable[[Tensor], None], count: int, work_batch: int, device: torch.device
) -> None:
    """Call ``run`` with the numbers 0 .. count - 1, at most ``work_batch`` of them at once.

    Where memory runs out the part is halved, with a warning, and tried again: ``run`` must leave
    nothing behind before its last step.

    Args:
        run: Gets the numbers as an int64 tensor (n).
        count: How many there are.
        work_batch: Most of them at once.
        device: Of the numbers.
    """
    start = 0

    def go_on(size: int) -> None:
        nonlocal start
        while start < count:
            run(torch.arange(start, min(start + size, count), device=device))
            start += size

    halving(go_on, work_batch)


def in_batches(
    function: Callable[[Tensor, Tensor], Tensor], image: Tensor, target: Tensor, work_batch: int
) -> Float[Tensor, "b ..."]:
    """``function`` of all images and their targets, at most ``work_batch`` of them at once."""
    parts: list[Tensor] = []
    in_parts(
        lambda part: parts.append(function(image[part], target[part])),
        len(image),
        work_batch,
        image.device,
    )
    return torch.cat(parts)
