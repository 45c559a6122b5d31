"""Rows of a weight overwritten, and put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .exact import Fold


class RowsChange:
    """W → W with some rows overwritten. The rows are kept as they were when merged."""

    additive = False
    invertible = False

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.indices = torch.cat([indices for indices, _ in rows])
        self.rows = torch.cat([values.detach() for _, values in rows])

    def apply(self, weight: Tensor) -> Tensor:
        """Return a weight with the rows."""
        return weight.index_copy(0, self.indices.to(weight.device), self.rows.to(weight))

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight`: the way back is not in the rows."""
        return weight


class RowsFold(Fold):
    """Overwrites rows in place; the few that were there are the way back. With `shared`, in a weight of the owner's own meanwhile.

    All modules that have the weight in common get the rows, as they should.
    """

    change: RowsChange

    def __init__(self, owner: nn.Module, name: str, change: RowsChange, *, shared: bool = False) -> None:
        super().__init__(owner, name, change, shared=shared)
        #: the parameter in which the rows are
        self.written: nn.Parameter | None = None
        self._before: Tensor | None = None

    def prepare(self) -> Tensor:
        """Return what is written, without touching anything."""
        if self._shared:
            return super().prepare()
        parameter = self.owner.get_parameter(self.name)
        self._before = parameter.detach()[self.change.indices.to(parameter.device)]
        return self.change.rows.to(parameter)

    def put(self, merged: Tensor) -> None:
        """Write the rows."""
        if self._shared:
            super().put(merged)
        else:
            self._write(merged)
        self.written = self.owner.get_parameter(self.name)

    def undo(self) -> None:
        """Write back what was there."""
        if self._shared:
            super().undo()
        else:
            assert self._before is not None
            self._write(self._before)
        self.written = None

    def before(self, merged: Tensor) -> Tensor:
        """Return the weight that was there before; changes nothing."""
        if self._shared or self._before is None:
            return super().before(merged)
        return merged.index_copy(0, self.change.indices.to(merged.device), self._before.to(merged))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the way back."""
        return 0 if self._before is None else self._before.numel() * self._before.element_size()

    def _write(self, rows: Tensor) -> None:
        parameter = self.owner.get_parameter(self.name)
        with torch.no_grad():
            parameter.index_copy_(0, self.change.indices.to(parameter.device), rows.to(parameter))
