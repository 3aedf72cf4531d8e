from __future__ import annotations

import subprocess
import sys

FAULTS = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which a kernel gives what it has left
from classifiers.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for k in range(40):
    if k == 30:  # some blocks are asked for until one fits every time (up to 9 seen)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MB, above the size that glibc always asks the system for
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_taken_again_without_page_faults() -> None:
    assert faults("keep") * 10 < faults("as it is")
