"""The mathematics of LoHa on tensors. Source: FedPara, arXiv 2108.06098.

ΔW = (B₁A₁) ⊙ (B₂A₂), with B₁, B₂ (out, r) and A₁, A₂ (r, in). Entry by entry

    ΔW[o, i] = Σ_ab B₁[o, a] B₂[o, b] · A₁[a, i] A₂[b, i],

a product of rank r² of the row-wise Khatri–Rao product of the B and the column-wise one of the A. So x ΔWᵀ never needs ΔW.
"""

from __future__ import annotations

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


def bilinear(x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Return x ΔWᵀ for few tokens, without forming any factor: y[o] = B₁[o]·M·B₂[o]ᵀ with M = A₁ diag(x) A₂ᵀ (r, r) per token.

    Args:
        x: (tokens, in).

    Returns:
        (tokens, out).
    """
    middle = F.linear(x.unsqueeze(-2) * a1, a2)  # (tokens, r, r)
    return (b1 @ middle).mul(b2).sum(-1)


def applied(x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Return x ΔWᵀ (…, out) for x (…, in), by the cheapest of three equal ways for this many tokens.

    Counting multiplications: bilinear r²(in + out) a token and no preparation, but one memory pass of r·in a token; Khatri–Rao
    r²(in + out) a token after as much once; ΔW in·out a token after 2r·in·out once.
    """
    out, inp, r = b1.shape[0], a1.shape[1], a1.shape[0]
    tokens = x.numel() // inp
    if tokens <= 2:
        return bilinear(x.reshape(tokens, inp), b1, a1, b2, a2).view(*x.shape[:-1], out)
    if (tokens + 1) * r * r * (inp + out) < (tokens + 2 * r) * inp * out:
        kb, ka = khatri_rao(b1, a1, b2, a2)
        return F.linear(F.linear(x, ka), kb)
    return F.linear(x, hadamard(b1, a1, b2, a2))
