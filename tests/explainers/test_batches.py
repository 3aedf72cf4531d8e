from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from explainers.batches import halving, in_batches, in_parts, out_of_memory

CPU = torch.device("cpu")


@given(count=st.integers(0, 20), work_batch=st.integers(1, 8), room=st.integers(1, 8))
def test_every_number_comes_once_and_in_order_whatever_the_memory(
    count: int, work_batch: int, room: int
) -> None:
    seen: list[int] = []

    def run(part: torch.Tensor) -> None:
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.extend(part.tolist())

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        in_parts(run, count, work_batch, CPU)
    assert seen == list(range(count))
    assert bool(warned) == (min(count, work_batch) > room)


def test_other_errors_and_a_batch_of_one_are_not_tried_again() -> None:
    calls = []

    def run(work_batch: int) -> None:
        calls.append(work_batch)
        raise RuntimeError("shapes differ" if work_batch > 2 else "not enough memory: 8 GB")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(run, 4)
    with (
        pytest.raises(RuntimeError, match="not enough memory"),
        pytest.warns(UserWarning, match="out of memory: going on with batches of 1"),
    ):
        halving(run, 2)
    assert calls == [4, 2, 1]


def test_words_for_full_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_batches_are_put_together_again() -> None:
    image, target = torch.rand(5, 1, 2, 2), torch.arange(5)
    found = in_batches(lambda x, k: x[:, 0] * k[:, None, None], image, target, 2)
    assert_close(found, image[:, 0] * target[:, None, None])
