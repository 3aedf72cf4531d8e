"""One way to time a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that does not count; work on a GPU is waited for.

    torch.utils.benchmark chooses the number of calls by their time, and would make one of a method
    that takes ten seconds.
    """
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])
