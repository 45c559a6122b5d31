"""The mathematics of LoHa on tensors. Source: FedPara, arXiv 2108.06098.

ΔW = (B₁A₁) ⊙ (B₂A₂), with B₁, B₂ (out, r) and A₁, A₂ (r, in). Entry by entry

    ΔW[o, i] = Σ_ab B₁[o, a] B₂[o, b] · A₁[a, i] A₂[b, i],

So ΔW has rank at most r²: it is the product of the row-wise Khatri–Rao product of B₁ and B₂ and the column-wise Khatri–Rao product of A₁ and A₂.
With these two factors, x ΔWᵀ can be computed without ΔW.
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
        b: B (r, out), transposed compared with the flat form.
    """
    r = t.shape[0]
    inner = torch.einsum("abk,bc->ack", t.reshape(r, r, -1), a)
    return torch.einsum("ack,ao->ock", inner, b).reshape(b.shape[1], a.shape[1], *t.shape[2:])


@dataclass(frozen=True)
class Costs:
    """The costs of the different ways to compute the same output. The unit is one multiplication in a large matrix product.

    Args:
        out, inp: the matrix has the shape (out, in).
        r: rank.

    The Khatri–Rao factors cost r²(in + out) per token. A full matrix costs in·out per token, or nothing if it replaces the base's own product, plus
    the cost to compute the matrix once: passes over memory, given in `forming` as multiplications per entry; they cost more if the matrix does not
    fit into the cache.
    """

    out: int
    inp: int
    r: int

    @property
    def thin(self) -> int:
        """Cost per token of the product with the Khatri–Rao factors."""
        return self.r * self.r * (self.inp + self.out)

    @property
    def whole(self) -> int:
        """Cost per token of the product with a full matrix (out, in)."""
        return self.inp * self.out

    @property
    def forming(self) -> int:
        """Cost of computing W + s·ΔW once."""
        return self.whole * (2 * self.r + (30 if self.whole <= 1 << 18 else 160))

    def prefer_whole_delta(self, tokens: int) -> bool:
        """Return whether x ΔWᵀ, computed in addition to the base's product, is cheaper with ΔW than with Khatri–Rao factors."""
        return (tokens + 1) * self.thin > tokens * self.whole + self.forming

    def prefer_whole_weight(self, tokens: int) -> bool:
        """Return whether x (W + s·ΔW)ᵀ is cheaper than xWᵀ plus x ΔWᵀ with Khatri–Rao factors."""
        return tokens * self.thin > self.forming

    def prefer_whole_gradient(self, tokens: int) -> bool:
        """Return whether the factors' gradients are cheaper to compute from dL/dW than from the gradients of the Khatri–Rao factors."""
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
    y.view(-1).addmv_(terms.t(), y.new_ones(terms.shape[0]), alpha=s)  # addmv_ sums over r, scales by s and adds to y in one call
    return y


def add_applied(y: Tensor, s: float, x: Tensor, factors: Factors, *, fixed: bool = False) -> Tensor:
    """Return y + s·x ΔWᵀ as a new tensor, with ordinary PyTorch operations, summed in the dtype of the factors and rounded once to the dtype of `y`.

    Args:
        y: (…, out).
        s: scaling.
        x: (…, in).
        factors: B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in).
        fixed: choose the method independently of the number of tokens, so that a compiled graph does not depend on this number.
    """
    b1, a1, _, _ = factors
    costs = Costs(b1.shape[0], a1.shape[1], a1.shape[0])
    if costs.thin > costs.whole if fixed else costs.prefer_whole_delta(x.numel() // max(x.shape[-1], 1)):
        change = F.linear(x, hadamard(*factors))
    else:
        kb, ka = khatri_rao(*factors)
        change = F.linear(F.linear(x, ka), kb)
    return torch.add(y, change, alpha=s) if y.dtype is change.dtype else (y + change * s).to(y.dtype)
