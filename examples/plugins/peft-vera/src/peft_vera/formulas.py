"""The mathematics of VeRA on tensors. Source: arXiv 2310.11454.

ΔW = diag(b) B diag(d) A, with A (r, in), B (out, r), d (r,), b (out,): entry by entry ΔW[o, i] = b[o] Σ_k B[o, k] d[k] A[k, i].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def delta(a: Tensor, b_matrix: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return diag(b) B diag(d) A, (out, in)."""
    return (b.unsqueeze(1) * b_matrix) @ (d.unsqueeze(1) * a)


def applied(x: Tensor, a: Tensor, b_matrix: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return x ΔWᵀ (…, out) for x (…, in), without forming ΔW."""
    return F.linear(F.linear(x, a) * d, b_matrix) * b


def draw(out: int, inp: int, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and then B (out, r) in float32, uniform with variance 2/columns, the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    matrices = []
    for rows, columns in ((r, inp), (out, r)):
        bound = math.sqrt(2.0) * math.sqrt(3.0) / math.sqrt(columns)
        matrices.append(torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return matrices[0], matrices[1]
