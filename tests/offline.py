"""Offline W&B runs read back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(path: Path, patience: float = 20.0) -> list[Any]:
    """Records of an offline run, all of them: W&B's own process may still write the last."""
    end = time.monotonic() + patience
    while True:
        records = list(records_so_far(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < end, f"{path} has no end after {patience} s."
        time.sleep(0.1)


def records_so_far(path: Path) -> Iterator[Any]:
    """Records that lie in a file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # the end of a block is padded
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""
