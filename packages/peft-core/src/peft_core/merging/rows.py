"""Overwrites some rows of a weight when an adapter is merged, and restores them when it is unmerged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .exact import Fold


class RowsChange:
    """A change W → W with some rows overwritten. It uses the values that the rows have when this object is created.

    Args:
        rows: pairs of (indices of rows, values of those rows); all pairs are concatenated.
    """

    additive = False
    invertible = False

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.indices = torch.cat([indices for indices, _ in rows])
        self.rows = torch.cat([values.detach() for _, values in rows])

    def apply(self, weight: Tensor) -> Tensor:
        """Return a copy of `weight` with the rows overwritten."""
        return weight.index_copy(0, self.indices.to(weight.device), self.rows.to(weight))

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight` unchanged: the old values can't be computed from the new rows."""
        return weight


class RowsFold(Fold):
    """Overwrites rows of a weight in place, and stores the old values of these rows for `undo`.

    Without `shared`, all modules that use the same weight see the new rows, which is intended. With `shared`, the rows are written into a separate
    parameter of `owner` while merged.
    """

    change: RowsChange

    def __init__(self, owner: nn.Module, name: str, change: RowsChange, *, shared: bool = False) -> None:
        super().__init__(owner, name, change, shared=shared)
        #: the parameter into which the rows were written; None while unmerged
        self.written: nn.Parameter | None = None
        self._before: Tensor | None = None

    def prepare(self) -> Tensor:
        """Return what `put` writes: the new rows, or, if `shared`, the whole merged weight. Does not modify the parameter."""
        if self._shared:
            return super().prepare()
        parameter = self.owner.get_parameter(self.name)
        self._before = parameter.detach()[self.change.indices.to(parameter.device)]
        return self.change.rows.to(parameter)

    def put(self, merged: Tensor) -> None:
        """Write `merged`, which `prepare` returned, into the weight."""
        if self._shared:
            super().put(merged)
        else:
            self._write(merged)
        self.written = self.owner.get_parameter(self.name)

    def undo(self) -> None:
        """Restore the old values of the rows."""
        if self._shared:
            super().undo()
        else:
            assert self._before is not None
            self._write(self._before)
        self.written = None

    def before(self, merged: Tensor) -> Tensor:
        """Return the weight from before the merge, given the current weight `merged`. Changes nothing."""
        if self._shared or self._before is None:
            return super().before(merged)
        return merged.index_copy(0, self.change.indices.to(merged.device), self._before.to(merged))

    @property
    def nbytes(self) -> int:
        """The number of bytes stored for `undo`."""
        return 0 if self._before is None else self._before.numel() * self._before.element_size()

    def _write(self, rows: Tensor) -> None:
        parameter = self.owner.get_parameter(self.name)
        with torch.no_grad():
            parameter.index_copy_(0, self.change.indices.to(parameter.device), rows.to(parameter))
