"""Best low-rank approximations of the weight change by a layer's adapters; if all adapters have low-rank factors, only these are decomposed.

A weight is viewed as (groups, out / groups, in): one matrix for each group of a convolution, and a single matrix for all other layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_core import AdapterLayer

#: kinds of base layers whose weight change can be expressed by one A and one B, or by one pair for each group of a convolution
KINDS = ("linear", "conv1d", "embedding", "convolution")


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition U·diag(S)·Vᵀ of each group of a weight.

    Args:
        u: (groups, out / groups, q).
        s: (groups, q), descending.
        vt: (groups, q, in).
        dtype: dtype of the weight.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    dtype: torch.dtype

    def energies(self) -> Tensor:
        """Return, for k = 1, …, q, the share of the first k singular values of every group in ΣS² (q,); ones for a zero weight."""
        found = self.s.double().square().sum(0).cumsum(0)
        return found / found[-1] if float(found[-1]) > 0 else torch.ones_like(found)

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that preserves at least this share of ΣS²."""
        energies = self.energies()
        # a share of 1 means all singular values that are larger than rounding errors
        reached = (energies >= min(share, 1 - 1e-12)).nonzero()
        return int(reached[0]) + 1

    def error(self, rank: int) -> float:
        """Return the relative error ‖W − W_rank‖ / ‖W‖ of the best approximation of this rank; 0 for a zero weight."""
        squares = self.s.double().square()
        whole = float(squares.sum())
        return math.sqrt(float(squares[:, rank:].sum()) / whole) if whole > 0 else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (groups · rank, in), whose rows are orthonormal in each group, and B = U·diag(S) (out, rank).

        If there are fewer singular values than `rank`, A and B are padded with zeros.
        """
        kept = min(rank, self.s.shape[1])
        a = self.vt.new_zeros(self.vt.shape[0], rank, self.vt.shape[2])
        b = self.u.new_zeros(self.u.shape[0], self.u.shape[1], rank)
        a[:, :kept] = self.vt[:, :kept]
        b[:, :, :kept] = self.u[:, :, :kept] * self.s[:, None, :kept]
        return a.flatten(0, 1).to(self.dtype), b.flatten(0, 1).to(self.dtype)


def groups_of(layer: AdapterLayer) -> int:
    """Return the number of groups of a convolution, each of which has a separate product B·A; 1 for other layers."""
    base: Any = layer.get_base_layer()
    return int(base.groups) if layer.ops.kind == "convolution" else 1


def change_of(layer: AdapterLayer, adapter: str) -> Tensor:
    """Return the exact change of the base weight by an adapter, as a matrix (out, in), including a factor by which it multiplies the weight.

    The change is relative to the original base: a matrix that the adapter's initialisation subtracted from the base weight is subtracted here, too.

    Raises:
        MergeError: the adapter's effect can't be expressed as a change of this weight.
    """
    with torch.no_grad():
        change = layer.delta_weight(adapter) if layer.is_additive(adapter) else layer.ops.matrix(layer.get_delta_weight(adapter))
        shift = layer.merging.shift_of(adapter)
        return change if shift is None else change - shift.to(change)


def decompose(layer: AdapterLayer, weights: Mapping[str, float]) -> Decomposition:
    """Decompose a weighted sum of the weight changes by adapters in a layer.

    If all changes are low-rank products, the cost is O((out + in)·R² + R³), where R is the sum of their ranks; otherwise the whole matrix is
    decomposed.

    Args:
        layer: a layer with all the adapters.
        weights: adapter → its weight in the sum.

    Raises:
        MergeError: the effect of an adapter can't be expressed as a change of this weight.
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
    """Decompose a matrix (out, in); the rows are split into `groups`, which are decomposed separately."""
    parts = matrix.detach().reshape(groups, -1, matrix.shape[1])
    u, s, vt = torch.linalg.svd(parts if parts.dtype == torch.float64 else parts.float(), full_matrices=False)
    return Decomposition(u, s, vt, matrix.dtype)


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, q), S (q,), Vᵀ (q, in) of B·A without computing this product: QR of both factors, then SVD of the small core matrix.

    Args:
        b: (out, R).
        a: (R, in).
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vt @ qa.T


def _factors(layer: AdapterLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return (B, A) if the adapter's whole effect is their product; otherwise None."""
    return layer.low_rank_factors(adapter) if layer.is_additive(adapter) else None


def _wide(tensor: Tensor) -> Tensor:
    """Return a factor in float64 (float32 on MPS, which lacks it): factors are small matrices, and the spaces that they span may differ little."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
