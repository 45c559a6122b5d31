"""The computation of y + s·xAᵀBᵀ without gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return y + s·(xAᵀ)Bᵀ without gradients, rounded once to the dtype of `y`; `y` may be overwritten.

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
    """
    wide = a.dtype
    if x.numel() == a.shape[1] and wide is x.dtype is y.dtype is b.dtype and y.is_contiguous():
        # a single token, as in decoding: matrix-vector products are faster than products with a matrix of one row
        y.view(-1).addmv_(b, torch.mv(a, x.reshape(-1)), alpha=s)
        return y
    x2 = x.reshape(-1, x.shape[-1]).to(wide)
    if y.dtype is wide and y.is_contiguous():
        _add_product(y.view(-1, y.shape[-1]), x2, a, b.to(wide), s)
        return y
    sum_dtype = torch.promote_types(y.dtype, wide)
    total = y.reshape(-1, y.shape[-1]).to(sum_dtype)
    total = _add_product(total.clone() if sum_dtype is y.dtype else total, x2.to(sum_dtype), a.to(sum_dtype), b.to(sum_dtype), s)
    return total.to(y.dtype).view(y.shape)


def _add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Add s·(xAᵀ)Bᵀ to `y` (tokens, out) in place."""
    return y.addmm_(a.mm(x.t()).t(), b.t(), alpha=s)
