"""Reads the `.wandb` files that W&B writes when it is offline: which steps reached the disk before a run was killed.

W&B's Python package (0.31) has the record types but no reader of the file around them, which is inside the `wandb-core` binary;
hence this one. The file is LevelDB's log (github.com/google/leveldb/blob/main/doc/log_format.md) behind a seven-byte header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a log. Ends without an error where a kill cut the file off."""
    content = path.read_bytes()
    place, parts = HEADER, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # the end of a block is filled with zeros
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        part = content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(part) < length:
            return
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts


def read_history(path: Path) -> list[dict[str, Any]]:
    """What was logged: one dict a call of `wandb.log`."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    rows = []
    for content in read_records(path):
        record = Record()
        try:
            record.ParseFromString(content)
        except DecodeError:
            break
        if record.WhichOneof("record_type") == "history":
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def read_logged_steps(output_dir: str | Path, run_id: str) -> set[int]:
    """Training steps in the offline files of a run."""
    files = sorted(Path(output_dir).glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    rows = [row for file in files for row in read_history(file)]
    return {int(row["train/global_step"]) for row in rows if "train/loss" in row and "train/global_step" in row}
