"""Files that are there as a whole or as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when all of it is written: a kill or a full disk leaves the old.

    Raises:
        OSError: If it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}); what was there is left.") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a text or bytes by `whole`."""
    with whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
