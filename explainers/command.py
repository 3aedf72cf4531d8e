"""How the commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plainly() -> Iterator[None]:
    """Bad input, or a file that cannot be had or written, ends a command with its sentence.

    SIMADV_TRACEBACK=1 shows where it arose.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("SIMADV_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
