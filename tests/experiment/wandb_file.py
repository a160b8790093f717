"""Reads what W&B wrote offline: its SDK has the records' format, but no longer a reader of the file."""

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, 7


def records(file):
    """Records of a .wandb file: 7 bytes of head, then LevelDB's log format in blocks of 32 KiB."""
    content, place, parts = Path(file).read_bytes(), HEADER, []
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        place += HEADER
        parts.append(content[place : place + length])
        place += length
        if kind in (1, 4):  # a whole one, or the last part of one
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class Offline:
    """One offline run, read from its folder."""

    def __init__(self, folder):
        (self.file,) = Path(folder).glob("run-*.wandb")
        self.folder = Path(folder)
        by_kind = {}
        for _ in range(100):  # `finish` returns a little before W&B's own process has written all
            by_kind.clear()
            for record in records(self.file):
                kind = record.WhichOneof("record_type")
                by_kind.setdefault(kind, []).append(getattr(record, kind))
            if "exit" in by_kind:
                break
            time.sleep(0.1)
        self.run = by_kind["run"][0]
        self.config = _items(self.run.config.update)
        self.later_configs = [_items(record.update) for record in by_kind.get("config", ())]
        self.rows = [_items(record.item) for record in by_kind.get("history", ())]
        self.summary = {}
        for record in by_kind.get("summary", ()):
            self.summary |= _items(record.update)
        self.artifacts = by_kind.get("artifact", [])
        self.saved = [file.path for record in by_kind.get("files", ()) for file in record.files]
        self.exits = [record.exit_code for record in by_kind.get("exit", ())]

    def values(self):
        """(metric, iteration) -> the values logged there, without W&B's own."""
        found = {}
        for row in self.rows:
            for key, value in row.items():
                if not key.startswith("_") and key != "iteration":
                    found.setdefault((key, row["iteration"]), []).append(value)
        return found


def _items(items):
    found = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return found
