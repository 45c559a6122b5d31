"""`peft-core inspect`: shows the contents of an adapter folder; the tuner need not be installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..plugins import registry
from .folders import Adapter, adapters_in, changed_fields, raw_config, tensors_of, weights_of
from .output import Report


def inspect(directory: Path) -> Report:
    """Return config, tensors, sizes and passport (versions of the writer, fingerprint of the base) of every adapter in a folder.

    Raises:
        AdapterFileError, ConfigFileError: the folder contains no adapter, or an adapter can't be read.
    """
    return {"directory": str(directory), "adapters": [_adapter(adapter, directory) for adapter in adapters_in(directory)]}


def _adapter(adapter: Adapter, root: Path) -> dict[str, Any]:
    raw = raw_config(adapter)
    file = weights_of(adapter)
    tensors = tensors_of(file)
    passport = {key: value for key, value in file.metadata.items() if key != "format"}
    base, _, fingerprint = passport.get("peft_base", "").rpartition(" ")
    peft_type = str(raw.get("peft_type") or "")
    return {
        "name": adapter.name,
        "folder": adapter.path.relative_to(root).as_posix(),
        "peft_type": peft_type or None,
        "installed": str(registry.owner(peft_type) or "") or None,
        "config": changed_fields(raw),
        "file": file.path.name,
        "file_bytes": file.path.stat().st_size,
        "tensors": [dataclasses.asdict(info) for info in tensors],
        "total": {"tensors": len(tensors), "numbers": sum(t.numbers for t in tensors), "bytes": sum(t.bytes for t in tensors)},
        "writer": {"core": passport.get("peft_core"), "tuner": passport.get("peft_tuner")} if passport else None,
        "base": {"class": base, "fingerprint": fingerprint} if fingerprint else None,
    }
