"""Best low-rank approximations of what adapters do to a layer, from their factors where they have some.

A weight is seen as (groups, out / groups, in): one matrix, but for convolutions with groups one for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_core import AdapterLayer

#: kinds of base layers whose change can be told by one A and one B, or by one for each group of a convolution
KINDS = ("linear", "conv1d", "embedding", "convolution")


@dataclass(frozen=True)
class Decomposition:
    """U·diag(S)·Vᵀ of each group of a weight.

    Args:
        u: (groups, out / groups, q).
        s: (groups, q), descending.
        vt: (groups, q, in).
        dtype: of the weight.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    dtype: torch.dtype

    def energies(self) -> Tensor:
        """Return which share of ΣS² the first 1, 2, … singular values of every group have (q,); of a zero weight all of it."""
        found = self.s.double().square().sum(0).cumsum(0)
        return found / found[-1] if float(found[-1]) > 0 else torch.ones_like(found)

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that keeps at least this share of ΣS²."""
        energies = self.energies()
        # a share of 1 means all that is more than rounding
        reached = (energies >= min(share, 1 - 1e-12)).nonzero()
        return int(reached[0]) + 1

    def error(self, rank: int) -> float:
        """Return ‖W − W_rank‖ / ‖W‖ of the best approximation of this rank; 0 for a zero weight."""
        squares = self.s.double().square()
        whole = float(squares.sum())
        return math.sqrt(float(squares[:, rank:].sum()) / whole) if whole > 0 else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (groups · rank, in), whose rows are orthonormal in each group, and B = U·diag(S) (out, rank).

        Where there are fewer singular values, the rest of A and B is zero.
        """
        kept = min(rank, self.s.shape[1])
        a = self.vt.new_zeros(self.vt.shape[0], rank, self.vt.shape[2])
        b = self.u.new_zeros(self.u.shape[0], self.u.shape[1], rank)
        a[:, :kept] = self.vt[:, :kept]
        b[:, :, :kept] = self.u[:, :, :kept] * self.s[:, None, :kept]
        return a.flatten(0, 1).to(self.dtype), b.flatten(0, 1).to(self.dtype)


def groups_of(layer: AdapterLayer) -> int:
    """Return into how many independent products the base's weight falls."""
    base: Any = layer.get_base_layer()
    return int(base.groups) if layer.ops.kind == "convolution" else 1


def change_of(layer: AdapterLayer, adapter: str) -> Tensor:
    """Return by how much an adapter changes the base weight as a matrix (out, in): exactly, factors and initialisation included.

    Where its initialisation took something out of the base, it is the change against the base without the adapter.

    Raises:
        MergeError: the effect is no change of this weight.
    """
    with torch.no_grad():
        change = layer.delta_weight(adapter) if layer.is_additive(adapter) else layer.ops.matrix(layer.get_delta_weight(adapter))
        shift = layer.merging.shift_of(adapter)
        return change if shift is None else change - shift.to(change)


def decompose(layer: AdapterLayer, weights: Mapping[str, float]) -> Decomposition:
    """Decompose a weighted sum of what adapters do to a layer.

    In O((out + in)·R² + R³) with the sum R of their ranks, where all are low-rank products; else of the whole matrix.

    Args:
        layer: a layer with all the adapters.
        weights: adapter → its weight in the sum.

    Raises:
        MergeError: an effect is no change of this weight.
    """
    with torch.no_grad():
        pairs = [(weight, None if layer.merging.shift_of(name) is not None else _factors(layer, name)) for name, weight in weights.items()]
        known = [(weight, *pair) for weight, pair in pairs if pair is not None]
        if len(known) == len(pairs) and sum(a.shape[0] for _, _, a in known) < min(layer.matrix_shape):
            dtype = known[0][1].dtype
            b = torch.cat([_wide(b) * weight for weight, b, _ in known], 1)
            a = torch.cat([_wide(a) for _, _, a in known], 0)
            u, s, vt = svd_of_product(b, a)
            return Decomposition(u[None], s[None], vt[None], dtype)
        total: Tensor | None = None
        for name, weight in weights.items():
            part = change_of(layer, name) * weight
            total = part if total is None else total + part
        assert total is not None
        return decompose_matrix(total, groups_of(layer))


def decompose_matrix(matrix: Tensor, groups: int = 1) -> Decomposition:
    """Decompose (out, in), group by group."""
    parts = matrix.detach().reshape(groups, -1, matrix.shape[1])
    u, s, vt = torch.linalg.svd(parts if parts.dtype == torch.float64 else parts.float(), full_matrices=False)
    return Decomposition(u, s, vt, matrix.dtype)


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, q), S (q,), Vᵀ (q, in) of B·A without forming it: QR of both, SVD of the small core.

    Args:
        b: (out, R).
        a: (R, in).
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vt @ qa.T


def _factors(layer: AdapterLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return (B, A) if they are all of the effect."""
    return layer.low_rank_factors(adapter) if layer.is_additive(adapter) else None


def _wide(tensor: Tensor) -> Tensor:
    """Return a factor in float64: they are small, and so are the differences of what they span. (MPS has no float64.)"""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
