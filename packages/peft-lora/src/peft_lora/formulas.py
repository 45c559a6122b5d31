"""The mathematics of LoRA on tensors. Source: arXiv 2106.09685; rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353."""

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


def grouped_delta(a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return s·B·A for each group, one under the other.

    Args:
        a: (groups, r, in / groups).
        b: (groups, out / groups, r).
        s: scaling.

    Returns:
        (out, in / groups).
    """
    return (torch.bmm(b.float(), a.float()) * s).to(b.dtype).flatten(0, 1) if b.dtype in _HALF else (torch.bmm(b, a) * s).flatten(0, 1)


def in_groups(matrix: Tensor, groups: int) -> Tensor:
    """Return a matrix (groups · n, m) as (groups, n, m)."""
    return matrix.reshape(groups, -1, matrix.shape[1])


def squared_row_norms(weight: Tensor, weight_norms: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return ‖W + s·B·A‖² of each row without forming it: ‖W‖² + 2s·Σ(WAᵀ ⊙ B) + s²·Σ(B(AAᵀ) ⊙ B).

    Where the terms cancel, the rows are formed after all.

    Args:
        weight: W (out, in).
        weight_norms: ‖W‖² (out,) in float64.
        a: A (r, in).
        b: B (out, r).
        s: scaling.

    Returns:
        (out,) in float64.
    """
    cross = (torch.mm(weight.to(b.dtype), a.T).double() * b).sum(1)
    own = (torch.mm(b, torch.mm(a, a.T)).double() * b).sum(1) * s * s
    found = weight_norms + 2 * s * cross + own
    low = found < 1e-4 * (weight_norms + own)
    if not torch.compiler.is_compiling() and bool(low.any()):
        found[low] = (weight[low].double() + s * b[low].double() @ a.double()).square().sum(1)
    return found.clamp_(min=0)
