"""The mathematics of LoHa on tensors. Source: FedPara, arXiv 2108.06098.

ΔW = (B₁A₁) ⊙ (B₂A₂), with B₁, B₂ (out, r) and A₁, A₂ (r, in). Entry by entry

    ΔW[o, i] = Σ_ab B₁[o, a] B₂[o, b] · A₁[a, i] A₂[b, i],

a product of rank r² of the row-wise Khatri–Rao product of the B and the column-wise one of the A. So x ΔWᵀ never needs ΔW.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Return (B₁A₁) ⊙ (B₂A₂), (out, in)."""
    return (b1 @ a1) * (b2 @ a2)


def khatri_rao(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """Return K_B (out, r²) and K_A (r², in) with K_B·K_A = (B₁A₁) ⊙ (B₂A₂)."""
    r, inp = a1.shape
    out = b1.shape[0]
    kb = (b1.unsqueeze(2) * b2.unsqueeze(1)).reshape(out, r * r)
    ka = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(r * r, inp)
    return kb, ka


def add_applied_to_one(y: Tensor, s: float, x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, ones: Tensor) -> Tensor:
    """Add s·x ΔWᵀ to `y` in place for a single token, without forming any factor of size r².

    y[o] += s·B₁[o]·M·B₂[o]ᵀ with M = A₁ diag(x) A₂ᵀ (r, r).

    Args:
        y: (…, out) with one token, contiguous.
        x: (…, in) with one token.
        ones: r ones, for the sum over a row.
    """
    terms = b1.mm(F.linear(a1 * x.view(-1), a2))
    terms = terms * b2 if torch.is_grad_enabled() else terms.mul_(b2)
    y.view(-1).addmv_(terms, ones, alpha=s)  # sums, scales and adds in one call
    return y


def add_applied(y: Tensor, s: float, x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Add s·x ΔWᵀ (…, out) to `y` in place, for x (…, in), by the cheaper of two equal ways for this many tokens.

    Multiplications: Khatri–Rao r²(in + out) a token after as much once; ΔW in·out a token after 2r·in·out once.
    """
    out, inp, r = b1.shape[0], a1.shape[1], a1.shape[0]
    tokens = x.numel() // inp
    if (tokens + 1) * r * r * (inp + out) < (tokens + 2 * r) * inp * out:
        kb, ka = khatri_rao(b1, a1, b2, a2)
        return y.add_(F.linear(F.linear(x, ka), kb), alpha=s)
    return y.add_(F.linear(x, hadamard(b1, a1, b2, a2)), alpha=s)
