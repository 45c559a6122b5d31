"""The file: events are appended as lines of JSON, and read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

#: the variable that names the file; unset or empty: nothing is written
ENVIRONMENT = "PEFT_AUDIT_LOG"
#: the files of an adapter whose digests are noted
FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
Event = dict[str, Any]


def append(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Add one line, with the time and the process. One write to a file opened for appending: lines of several processes do not mix.

    Raises:
        OSError: the file can't be written.
    """
    event = {"time": datetime.now(timezone.utc).isoformat(timespec="microseconds"), "pid": os.getpid(), **facts}
    line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> list[Event]:
    """Return the events of a log, oldest first.

    Raises:
        ValueError: a line is no JSON object; the message has its number.
        OSError: the file can't be read.
    """
    events = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
        if not isinstance(event, dict):
            raise ValueError(f"line {number} of {str(path)!r} is no JSON object")
        events.append(event)
    return events


def digests(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of each adapter file in a folder; empty where there is none."""
    found = {}
    for name in FILES:
        path = Path(folder) / name
        if path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    return found


def changed(events: Iterable[Event]) -> dict[str, list[str]]:
    """Return folder → files that are not what they were (changed, gone or new) when an adapter was last saved there or loaded from there."""
    last = {event["path"]: event["files"] for event in events if event.get("event") in ("saved", "loaded") and event.get("files")}
    found = {}
    for folder, noted in last.items():
        now = digests(folder)
        names = [name for name in FILES if now.get(name) != noted.get(name)]
        if names:
            found[folder] = names
    return found


def _digest(file: Any) -> str:
    hasher = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()
