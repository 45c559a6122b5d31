"""The computation of y + s·drop(x)AᵀBᵀ with or without gradients, also while a graph is traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import can_fuse

from .add_low_rank import add_low_rank
from .add_scaled import add_scaled
from .record_low_rank import record_low_rank


def add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float | Tensor, p: float = 0.0) -> Tensor:
    """Return y + s·drop(x)AᵀBᵀ, differentiable with respect to y, x, A and B; `y` may be overwritten.

    Plain torch operations are used instead of the autograd function under autocast, torch.compile, tracing and the like (`can_fuse`).

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
        p: dropout probability; 0 outside of training.
    """
    if isinstance(s, Tensor):  # the scaling is a tensor in a compiled model whose adapters are swapped
        s, b = 1.0, b * s
    if not can_fuse(x) or a.dim() != 2:
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        return add_scaled(y, F.linear(F.linear(F.dropout(x, p) if p else x, a), b), s)
    if torch.is_grad_enabled():
        return record_low_rank(y, x, a, b, s, p)
    return add_low_rank(y, F.dropout(x, p) if p else x, a, b, s)
