"""The mathematics of LoRA on tensors. Source: arXiv 2106.09685; rsLoRA: arXiv 2312.03732."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def scaling(alpha: float, r: int, rslora: bool) -> float:
    """Return s = alpha / r, or alpha / √r."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def delta(a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return s·B·A.

    Args:
        a: A (r, in).
        b: B (out, r).
        s: scaling.

    Returns:
        (out, in) in the dtype of B; half precision on the CPU is multiplied in float32 and rounded once.
    """
    if b.dtype in _HALF and b.device.type == "cpu":
        return (b.float() @ a.float() * s).to(b.dtype)
    return b @ a * s
