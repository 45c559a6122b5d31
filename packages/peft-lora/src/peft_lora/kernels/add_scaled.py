"""y + s·change."""

from __future__ import annotations

import torch
from torch import Tensor


def add_scaled(y: Tensor, change: Tensor, s: float | Tensor) -> Tensor:
    """Return y + s·change in new memory, rounded once to the dtype of `y`. Where s is a tensor, a compiled graph reads its value anew each time."""
    if y.dtype is change.dtype and not isinstance(s, Tensor):
        return torch.add(y, change, alpha=s)
    return (y + change * s).to(y.dtype)
