"""The manifest of a saved model with several adapters: their names, folders and load order, and the active adapters in their order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterFileError, listed
from ..plugins import registry
from ..tuners.index import AdapterIndex

MANIFEST_NAME = "peft_stack.json"
_FORMAT = 1


@dataclass(frozen=True)
class Member:
    """One adapter of a stack: its name, its folder relative to the manifest, its method, and the distribution that wrote it."""

    name: str
    folder: str
    peft_type: str
    written_by: str


@dataclass(frozen=True)
class Stack:
    """A manifest. `members` are in load order; `active` are the active adapters, in the order in which they are applied in each layer."""

    members: tuple[Member, ...]
    active: tuple[str, ...]


def manifest_text(index: AdapterIndex, root: Path, folders: Mapping[str, Path]) -> str:
    """Return the text of the manifest for adapters saved in `folders` below `root`."""
    members = []
    for name in index.configs:
        if name in folders:
            peft_type = str(index.configs[name].peft_type)
            owner = registry.owner(peft_type)
            folder = folders[name].relative_to(root).as_posix()
            members.append({"name": name, "folder": folder, "peft_type": peft_type, "written_by": str(owner) if owner else ""})
    active = [name for name in index.active if name in folders]
    return json.dumps({"format": _FORMAT, "adapters": members, "active": active}, indent=2) + "\n"


def read_stack(directory: str | os.PathLike[str]) -> Stack:
    """Read the manifest in `directory`.

    Raises:
        AdapterFileError: there is no manifest, it can't be read, or a folder that it names is missing or is outside `directory`.
    """
    root = Path(directory)
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise AdapterFileError(
            f"{str(root)!r} holds no {MANIFEST_NAME}", hint="a model with several adapters writes one; for a single adapter use from_pretrained"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise AdapterFileError(f"{str(path)!r} has format {found['format']!r}, not {_FORMAT}", hint="was it written by a newer peft-core?")
        members = tuple(Member(str(m["name"]), str(m["folder"]), str(m["peft_type"]), str(m.get("written_by", ""))) for m in found["adapters"])
        active = tuple(str(name) for name in found["active"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{str(path)!r} can't be read as a manifest: {type(error).__name__}: {error}") from error
    outside = [m.folder for m in members if not (root / m.folder).resolve().is_relative_to(root.resolve())]
    if outside:
        raise AdapterFileError(f"{str(path)!r} names folders outside its own: {listed(outside)}")
    unknown = [name for name in active if name not in {m.name for m in members}]
    if unknown or not members:
        raise AdapterFileError(
            f"{str(path)!r} lists {'no adapters' if not members else f'{listed(unknown)} as active, which are not among its adapters'}"
        )
    return Stack(members, active)
