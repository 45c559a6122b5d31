"""DoRA by forming W + s·B·A, without gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formulas import TINY


def dora_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
    """Return what `dora_linear` does, without gradients, by forming W + s·B·A: for a small W in float32 (`formulas.forms_rows`)."""
    rows, f = dora_rows(weight, a, b, m, s)
    y = F.linear(x, rows)
    return y.mul_(f) if bias is None else torch.addcmul(bias, y, f)


def dora_rows(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return W + s·B·A (out, in) and f = m / its row norms (out,); f of a row of zeros stands for nothing."""
    rows = torch.addmm(weight, b, a, alpha=s)
    return rows, m / torch.linalg.vector_norm(rows, dim=1).clamp_(min=TINY)
