from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from explainers.batches import (
    Budget,
    halving,
    in_batches,
    in_parts,
    limit_memory,
    out_of_memory,
)

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


BUDGET = """
import json, sys, warnings
import torch
from explainers.batches import in_batches, limit_memory, peak_memory
warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
layer = torch.nn.Conv2d(3, 64, 3).requires_grad_(False)
image, target, sizes = torch.rand(64, 3, 128, 128), torch.zeros(64).long(), []
def run(part, _):
    sizes.append(len(part))
    return layer(part).amax((1, 2, 3))
expected = torch.cat([run(part, None) for part in image.split(1)])
sizes.clear()
limit_memory(2**20, image.device)
in_batches(run, image[:1], target[:1], 1)  # imports and first pages of the mode are not counted
sizes.clear()
budget = int(peak_memory(image.device, reset=True) / 2**20) + int(sys.argv[1])
limit_memory(budget, image.device)
found = in_batches(run, image, target, 64)
torch.testing.assert_close(found, expected)
print(json.dumps([budget, peak_memory(image.device) / 2**20, sizes]))
"""


# 64 MB are kept back. An image takes 4, or 8 where its layout is changed; other pages come and go
# by some 10, which has to be little beside the room that is left.
@pytest.mark.parametrize(
    ("more", "least"), [(64 + 200, 16), pytest.param(64 + 100, 8, marks=pytest.mark.slow)]
)
def test_the_peak_stays_under_the_budget(more: int, least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUDGET, str(more)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    budget, peak, sizes = json.loads(done.stdout)
    assert sizes[0] == 64
    assert 64 > sizes[-1] >= least
    assert peak <= budget
    assert peak > budget - 64 - 4 * 2 * sizes[-1]  # what is allowed is used


def test_a_budget_that_is_used_up_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "bytes", None)
    with pytest.raises(ValueError, match=r"memory_megabytes must be above the \d+ .* but got 100"):
        limit_memory(100, CPU)
    assert Budget.bytes is None


def test_gradients_and_nested_batches_under_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients as without; too little for one image is an error."""
    image = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Conv2d(3, 64, 3).requires_grad_(False)

    def gradient(part: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        free = part.clone().requires_grad_()
        (found,) = torch.autograd.grad(layer(free).square().sum(), free)
        return found

    def nested(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return in_batches(gradient, part, target, 4)

    target = torch.zeros(8).long()
    expected = gradient(image, target)
    reported = [0.0]  # the pages of small work come and go: the test counts by itself
    monkeypatch.setattr("explainers.batches.resident", lambda: reported[0])
    monkeypatch.setattr(Budget, "bytes", 2.5 * 4 * 64 * 62 * 62)
    with pytest.warns(UserWarning, match="out of memory: going on with batches of 1"):
        assert_close(in_batches(nested, image, target, 8), expected)
    reported[0] = 2.5 * 4 * 64 * 62 * 62
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="would exceed memory_megabytes; raise it"),
    ):
        in_batches(gradient, image, target, 8)
