"""Work cut into batches that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")


def halving(run: Callable[[int], T], work_batch: int) -> T:
    """Result of ``run``, whose batch is halved with a warning where memory runs out.

    Args:
        run: Gets the most that may be worked on at once.
        work_batch: To begin with.
    """
    while True:
        try:
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
