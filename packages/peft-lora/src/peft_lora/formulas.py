"""The mathematics of LoRA on tensors. Source: arXiv 2106.09685; rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
#: used as the norm of a row whose norm is zero, to avoid a division by zero
TINY = 1e-12
#: largest number of entries of a W for which W + s·B·A is computed explicitly
SMALL = 1 << 18


def scaling(alpha: float, r: int, rslora: bool) -> float:
    """Return the scaling s = alpha / r, or alpha / √r with rsLoRA."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def delta(a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return s·B·A.

    Args:
        a: A (r, in).
        b: B (out, r).
        s: scaling.

    Returns:
        (out, in) in the dtype of B; half precision on the CPU is computed in float32 and rounded once at the end.
    """
    if b.dtype in _HALF and b.device.type == "cpu":
        return (b.float() @ a.float() * s).to(b.dtype)
    return b @ a * s


def grouped_delta(a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return s·B·A of each group, concatenated along the output dimension.

    Args:
        a: (groups, r, in / groups).
        b: (groups, out / groups, r).
        s: scaling.

    Returns:
        (out, in / groups).
    """
    return (torch.bmm(b.float(), a.float()) * s).to(b.dtype).flatten(0, 1) if b.dtype in _HALF else (torch.bmm(b, a) * s).flatten(0, 1)


def in_groups(matrix: Tensor, groups: int) -> Tensor:
    """Reshape a matrix (groups · n, m) to (groups, n, m)."""
    return matrix.reshape(groups, -1, matrix.shape[1])


def squared_row_norms(weight: Tensor, a: Tensor, b: Tensor, s: float | Tensor) -> Tensor:
    """Return the squared norm of each row of W + s·B·A without computing this matrix: ‖W‖² + 2s·Σ(WAᵀ ⊙ B) + s²·Σ(B(AAᵀ) ⊙ B).

    For a W of at most `SMALL` entries on the CPU, the matrix is computed nevertheless, since that is faster.

    Rows in which the terms cancel are computed explicitly, to avoid the loss of precision. In a compiled graph and on accelerators, this
    would break the graph or synchronise with the device; there, the products are computed in float64 instead.

    Args:
        weight: W (out, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.

    Returns:
        (out,) in float64.
    """
    s = s.item() if isinstance(s, Tensor) and not torch.compiler.is_compiling() else s
    branch = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    wide = torch.float32 if branch and b.dtype is not torch.float64 else torch.float64
    a, b = a.to(wide), b.to(wide)
    if branch and forms_rows(weight):
        rows: Tensor = torch.linalg.vector_norm(torch.addmm(weight.to(wide), b, a, alpha=s), dim=1)  # type: ignore[arg-type]
        return rows.double().square()
    # W is converted to the wider dtype a few rows at a time, so that no second copy of W is in memory
    parts = torch.split(weight, max(1, 2**20 // weight.shape[1])) if weight.dtype is not wide else (weight,)
    products = [a.mm(part.to(wide).t()) for part in parts]
    cross = products[0] if len(products) == 1 else torch.cat(products, 1)  # (r, out)
    columns = b.t()
    own = (a.mm(a.t()).mm(columns).double() * columns).sum(0) * (s * s)
    weight_norms = row_norms(weight, wide)
    found = weight_norms + (cross.double() * columns).sum(0) * (2 * s) + own
    if branch:
        low = found < 1e-4 * (weight_norms + own)
        if bool(low.any()):
            found[low] = (weight[low].double() + s * b[low].double() @ a.double()).square().sum(1)
    return found.clamp_(min=0)


def forms_rows(weight: Tensor) -> bool:
    """Return whether computing W + s·B·A explicitly is faster than the terms of the row norms: for a small W (out, in) on the CPU."""
    return weight.numel() <= SMALL and weight.device.type == "cpu"


def dora_factor(m: Tensor, norms: Tensor) -> Tensor:
    """Return f = m / norms (out,), differentiable with respect to m; f is 1 for rows whose magnitude and norm are both zero.

    Args:
        m: magnitudes (out,).
        norms: the row norms of W + s·B·A (out,), with `TINY` in place of zero.
    """
    return torch.where((norms <= TINY) & (m == 0), torch.ones_like(m), m / norms)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the squared norm of each row of W, (out,) in float64; the sums over the rows are computed in `dtype`."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return norms.double().square()
