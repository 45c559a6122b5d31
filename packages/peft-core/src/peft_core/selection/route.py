"""Which adapters act on which rows of one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import RoutingError

EMPTY: Mapping[str, Any] = MappingProxyType({})

#: the name that stands for "no adapter" in a per-sample route
BASE = "__base__"


@dataclass(frozen=True, eq=False)
class Route:
    """The adapters of one forward pass: `names` for all rows of a batch, or `per_row` with the names for each row.

    Args:
        names: the adapters that every row uses, in the order in which they are applied. With `per_row`: all adapters that at least one row uses, in
            the same order; may be left empty, then `used` computes them.
        per_row: for each row the adapters that it uses; ``()`` means the base model without adapters.
        context: values for this call that a tuner passes to its own layers.
        active_mask: mask of the active adapters, which compiled graphs read; a bool tensor (adapters,), with `per_row` (rows, adapters). It is set by
            `AdapterSelection.use`, if compiled graphs may exist.
    """

    names: tuple[str, ...] = ()
    per_row: tuple[tuple[str, ...], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    active_mask: Tensor | None = field(default=None, repr=False)
    _ids: dict[tuple[str, int, torch.device | None], Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def used(self) -> tuple[str, ...]:
        """The names of all adapters that at least one row uses."""
        if self.per_row is None or self.names:
            return self.names
        return tuple(dict.fromkeys(name for row in self.per_row for name in row))

    def rows(self, adapter: str, batch: int, device: torch.device | None = None) -> Rows:
        """Return which rows of a batch use `adapter`: None (no row), `ALL`, or a tensor of row numbers (rows,) on `device`.

        Each entry of `per_row` applies to ``batch / len(per_row)`` consecutive rows: the beams of one sample, or the tokens of a flattened batch.

        Raises:
            RoutingError: the batch size is not a multiple of the length of `per_row`.
        """
        if self.per_row is None:
            return ALL if adapter in self.names else None
        key = (adapter, batch, device)
        if key not in self._ids:
            repeat, rest = divmod(batch, len(self.per_row))
            if rest or not repeat:
                raise RoutingError(
                    f"adapter_names has {len(self.per_row)} entries, but a layer gets a batch of {batch} rows, which is not a multiple of it",
                    hint="give one entry per sample",
                )
            ids = [i * repeat + j for i, names in enumerate(self.per_row) if adapter in names for j in range(repeat)]
            self._ids[key] = torch.tensor(ids, device=device) if ids else None
        ids_or_none = self._ids[key]
        if ids_or_none is None:
            return None
        return ALL if ids_or_none.shape[0] == batch else ids_or_none

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "per_row": self.per_row, "context": dict(self.context)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "active_mask": None, "_ids": {}}.items():
            object.__setattr__(self, name, value)


class _All:
    """The type of `ALL`: a singleton that means all rows of a batch, as ``slice(None)`` does."""

    _instance: _All | None = None

    def __new__(cls) -> _All:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "ALL"

    def __deepcopy__(self, memo: Any) -> _All:
        return self

    def __reduce__(self) -> Any:
        return (_All, ())


#: the value that `Route.rows` returns if all rows of the batch use the adapter
ALL = _All()


Rows = Tensor | _All | None


NO_ROUTE = Route()


def read_names(names: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """Convert a list such as ``["a", "__base__", ["a", "b"]]`` to one tuple of adapter names per row; ``"__base__"`` becomes ``()``.

    Raises:
        RoutingError: an entry is neither a name nor a list of names.
    """
    if isinstance(names, str):
        raise RoutingError(f"adapter_names must be a list, and is the string {names!r}", hint="give a list with one entry per sample")
    given = tuple(names)
    if torch.compiler.is_compiling():
        return _rows(given)
    try:
        return _remembered(given)  # servers send the same names at every generation step
    except TypeError:  # entries that are lists can't be hashed
        return _rows(given)


def _rows(names: tuple[Any, ...]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for position, entry in enumerate(names):
        members = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, (list, tuple)) else None
        if members is None or not all(isinstance(member, str) for member in members):
            raise RoutingError(f"adapter_names[{position}]={entry!r} is not an adapter name", hint="give names, or lists of names")
        rows.append(tuple(member for member in members if member != BASE))
    return tuple(rows)


_remembered = functools.lru_cache(maxsize=16)(_rows)
