"""The mathematics of LoHa on tensors. Source: FedPara, arXiv 2108.06098.

ΔW = (B₁A₁) ⊙ (B₂A₂), with B₁, B₂ (out, r) and A₁, A₂ (r, in). Entry by entry

    ΔW[o, i] = Σ_ab B₁[o, a] B₂[o, b] · A₁[a, i] A₂[b, i],

a product of rank r² of the row-wise Khatri–Rao product of the B and the column-wise one of the A. So x ΔWᵀ never needs ΔW.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def hadamard(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Return (B₁A₁) ⊙ (B₂A₂), (out, in)."""
    return (b1 @ a1) * (b2 @ a2)


def khatri_rao(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """Return K_B (out, r²) and K_A (r², in) with K_B·K_A = (B₁A₁) ⊙ (B₂A₂)."""
    return (b1.unsqueeze(2) * b2.unsqueeze(1)).flatten(1), columns(a1, a2)


def columns(a1: Tensor, a2: Tensor) -> Tensor:
    """Return the column-wise Khatri–Rao product (r², n) of two matrices (r, n): row a·r + b is a1[a] ⊙ a2[b]."""
    return (a1.unsqueeze(1) * a2.unsqueeze(0)).flatten(0, 1)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return W[o, c, κ] = Σ_ab t[a, b, κ]·A[b, c]·B[a, o] (out, in, *kernel).

    Args:
        t: core (r, r, *kernel).
        a: A (r, in).
        b: B (r, out), the other way round than in the flat form.
    """
    r = t.shape[0]
    inner = torch.einsum("abk,bc->ack", t.reshape(r, r, -1), a)
    return torch.einsum("ack,ao->ock", inner, b).reshape(b.shape[1], a.shape[1], *t.shape[2:])


@dataclass(frozen=True)
class Costs:
    """What the ways to the same output cost, in multiplications of a large matrix product.

    Args:
        out, inp: the matrix has the shape (out, in).
        r: rank.

    Khatri–Rao costs r²(in + out) a token. A whole matrix costs in·out a token, or nothing where it stands for the base's own, and first it
    has to be formed: passes over memory, which cost as much as this many multiplications an entry, more where the matrix leaves the cache.
    """

    out: int
    inp: int
    r: int

    @property
    def thin(self) -> int:
        """Khatri–Rao, a token."""
        return self.r * self.r * (self.inp + self.out)

    @property
    def whole(self) -> int:
        """A product with a whole matrix, a token."""
        return self.inp * self.out

    @property
    def forming(self) -> int:
        """Forming W + s·ΔW once."""
        return self.whole * (2 * self.r + (30 if self.whole <= 1 << 18 else 160))

    def prefer_whole_delta(self, tokens: int) -> bool:
        """Return whether x ΔWᵀ is cheaper with ΔW than with Khatri–Rao factors, beside the base."""
        return (tokens + 1) * self.thin > tokens * self.whole + self.forming

    def prefer_whole_weight(self, tokens: int) -> bool:
        """Return whether x (W + s·ΔW)ᵀ is cheaper than xWᵀ and x ΔWᵀ with Khatri–Rao factors."""
        return tokens * self.thin > self.forming

    def prefer_whole_gradient(self, tokens: int) -> bool:
        """Return whether the factors' gradients are cheaper from dL/dW than from those of the Khatri–Rao factors."""
        return 2 * tokens * self.thin > tokens * self.whole + 2 * self.forming


def add_applied_to_one(y: Tensor, s: float, x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Add s·x ΔWᵀ to `y` in place for a single token, without gradients and without forming any factor of size r².

    y[o] += s·B₁[o]·M·B₂[o]ᵀ with M = A₁ diag(x) A₂ᵀ (r, r).

    Args:
        y: (…, out) with one token, contiguous.
        s: scaling.
        x: (…, in) with one token, in the dtype of `y` and of the factors.
        b1, a1, b2, a2: B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in).
    """
    terms = torch.mm(F.linear(a2 * x.view(-1), a1), b1.t()).mul_(b2.t())  # (r, out)
    y.view(-1).addmv_(terms.t(), y.new_ones(terms.shape[0]), alpha=s)  # sums, scales and adds in one call
    return y


def add_applied(y: Tensor, s: float, x: Tensor, factors: Factors, *, fixed: bool = False) -> Tensor:
    """Return y + s·x ΔWᵀ in plain operations and new memory, summed in the dtype of the factors and rounded once to that of `y`.

    Args:
        y: (…, out).
        s: scaling.
        x: (…, in).
        factors: B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in).
        fixed: choose the way without looking at the number of tokens, so that a compiled graph does not depend on it.
    """
    b1, a1, _, _ = factors
    costs = Costs(b1.shape[0], a1.shape[1], a1.shape[0])
    if costs.thin > costs.whole if fixed else costs.prefer_whole_delta(x.numel() // max(x.shape[-1], 1)):
        change = F.linear(x, hadamard(*factors))
    else:
        kb, ka = khatri_rao(*factors)
        change = F.linear(F.linear(x, ka), kb)
    return torch.add(y, change, alpha=s) if y.dtype is change.dtype else (y + change * s).to(y.dtype)
