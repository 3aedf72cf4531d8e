from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from classifiers.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for k in range(13):
    if k == 3:  # the first blocks are asked for in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MB, above the size that glibc always asks the system for
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_taken_again_without_page_faults() -> None:
    assert faults("keep") * 10 < faults("as it is")
