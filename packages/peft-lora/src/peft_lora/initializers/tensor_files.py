"""Read and write dicts of tensors with `torch.save`; initialisers cache in them what they computed from data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_core import AdapterFileError


def tensors_in(path: str) -> dict[str, Tensor]:
    """Load a dict of tensors that was saved with `torch.save`, on the CPU; code in the file is not executed.

    Raises:
        AdapterFileError: the file can't be read, or does not contain a dict of tensors.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"{path!r} can't be read: {error}", hint="it should be a dict of tensors saved with torch.save") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise AdapterFileError(f"{path!r} is no dict of tensors")
    return held


def write_tensors(path: str | None, tensors: Mapping[str, Tensor]) -> None:
    """Save a dict of tensors with `torch.save` to a temporary file, then rename it, so that no incomplete file remains; None: do nothing."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part)
    os.replace(part, target)
