"""Principal component analysis of rows that come in batches, exact while nothing is cut off."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class IncrementalPca:
    """Principal directions of all rows seen so far (Ross et al. 2008, as scikit-learn's IncrementalPCA has it), in float64.

    What lies beyond `components` directions is dropped after each batch; with as many as there are features nothing is, and the result is
    that of all rows at once.

    Args:
        components: how many directions are kept.

    Attributes:
        directions: (components, features), orthonormal, largest variance first; the entry of the largest magnitude in each is positive.
        singular_values: (components,) of the centred rows.
        ratios: (components,), share of the total variance.
        converged: (components,), whether a direction moved by less than `update` was told.
        rows: how many were seen.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.rows = 0
        self.mean = self.directions = self.singular_values = self.ratios = torch.empty(0)
        self.converged = torch.zeros(components, dtype=torch.bool)
        self._squares = 0.0

    def update(self, x: Tensor, cosine: float = 1.0) -> None:
        """Take in rows.

        Args:
            x: (rows, features), finite; the first batch has at least `components` rows.
            cosine: a direction has converged when its cosine with what it was before is at least this.
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
    """Return the largest singular values (count,) of a matrix and its right singular vectors (count, features), by the smaller Gram matrix.

    Args:
        matrix: (rows, features) in float64.
        count: at most the smaller of both.
    """
    if matrix.shape[0] > matrix.shape[1]:
        energies, vectors = torch.linalg.eigh(matrix.T @ matrix)
        directions = vectors.flip(1)[:, :count]
    else:
        energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
        # orthonormal also where a singular value is nearly zero and Xᵀu nearly nothing
        directions = torch.linalg.qr(matrix.T @ vectors.flip(1)[:, :count]).Q
    return energies.flip(0)[:count].clamp_min(0).sqrt(), directions.T
