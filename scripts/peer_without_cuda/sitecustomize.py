"""Lets LoftQ of the peer run on a machine without CUDA, where it moves weights to "cuda" by name: with this folder on PYTHONPATH, that is the CPU."""

from __future__ import annotations

from typing import Any

import torch

_to: Any = torch.Tensor.to


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Do what `Tensor.to` does, on the CPU."""
    return _to(self, *map(_here, args), **{key: _here(value) for key, value in kwargs.items()})


if not torch.cuda.is_available():
    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
