"""Incremental principal component analysis of rows that arrive in batches; exact as long as no component is truncated."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class IncrementalPca:
    """Principal directions of all rows seen so far (Ross et al. 2008, the algorithm of scikit-learn's IncrementalPCA), in float64.

    After each batch, all but the first `components` directions are discarded. If `components` equals the number of features, nothing is
    discarded, and the result equals the PCA of all rows at once.

    Args:
        components: number of directions to compute.

    Attributes:
        directions: (components, features), orthonormal, largest variance first; the entry of the largest magnitude in each is positive.
        singular_values: (components,), the singular values of the matrix of centred rows.
        ratios: (components,), the share of the total variance that each direction explains.
        converged: (components,) booleans: whether the cosine of a direction with its estimate before the last `update` reached the given threshold.
        rows: number of rows processed so far.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.rows = 0
        self.mean = self.directions = self.singular_values = self.ratios = torch.empty(0)
        self.converged = torch.zeros(components, dtype=torch.bool)
        self._squares = 0.0

    def update(self, x: Tensor, cosine: float = 1.0) -> None:
        """Update the principal directions with a batch of rows.

        Args:
            x: (rows, features), finite; the first batch has at least `components` rows.
            cosine: a direction has converged when the cosine with its previous estimate is at least this value.
        """
        x = x.double()
        count, mean = x.shape[0], x.mean(0)
        stack = x - mean
        squares = float(stack.square().sum())
        if self.rows:
            offset = self.mean - mean
            weight = self.rows * count / (self.rows + count)
            stack = torch.cat([self.singular_values[:, None] * self.directions, stack, math.sqrt(weight) * offset[None]])
            squares += self._squares + weight * float(offset.square().sum())
            mean = mean + offset * (self.rows / (self.rows + count))
        values, directions = leading_directions(stack, self.components)
        directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        if self.rows:
            self.converged = ((directions * self.directions).sum(1) >= cosine).cpu()
        self.rows += count
        self.mean, self.directions, self.singular_values, self._squares = mean, directions, values, squares
        self.ratios = values.square() / squares if squares > 0 else torch.zeros_like(values)


def leading_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (count,) of a matrix and their right singular vectors (count, features).

    Both come from an eigendecomposition of the smaller one of the two Gram matrices, XᵀX and XXᵀ.

    Args:
        matrix: (rows, features) in float64.
        count: how many; at most min(rows, features).
    """
    if matrix.shape[0] > matrix.shape[1]:
        energies, vectors = torch.linalg.eigh(matrix.T @ matrix)
        directions = vectors.flip(1)[:, :count]
    else:
        energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
        # QR keeps the vectors orthonormal where a singular value, and with it Xᵀu, is nearly zero
        directions = torch.linalg.qr(matrix.T @ vectors.flip(1)[:, :count]).Q
    return energies.flip(0)[:count].clamp_min(0).sqrt(), directions.T
