"""Which adapters take part in a forward pass: one object per model, read by every layer, overridable per thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base.plain import is_observed
from ..errors import PeftWarning, RoutingError
from .cache import CacheScope, may_cache

T = TypeVar("T")

#: the name that stands for "no adapter" in a per-sample route
BASE = "__base__"
EMPTY: Mapping[str, Any] = MappingProxyType({})
#: for each selection the route that a task of an event loop follows
_TASK_ROUTES: contextvars.ContextVar[Mapping[Any, Any]] = contextvars.ContextVar("peft_core_task_routes", default=MappingProxyType({}))


@dataclass(frozen=True, eq=False)
class Route:
    """The adapters of one forward pass: `names` for all rows of a batch, or `per_row` names for each row.

    Args:
        names: adapters that every row uses, in the order in which they act; with `per_row`, all that some row uses, in that order.
        per_row: for each row the adapters that it uses; ``()`` is the plain base.
        context: things that a tuner tells its own layers for this call.
        active_mask: the same as numbers, for compiled graphs: bool (adapters,), or (rows, adapters) with `per_row`; `AdapterSelection.use` sets it.
    """

    names: tuple[str, ...] = ()
    per_row: tuple[tuple[str, ...], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    #: the same as numbers, for compiled graphs: see `AdapterSelection.active_mask`; (adapters,), or (rows, adapters) with `per_row`
    active_mask: Tensor | None = field(default=None, repr=False)
    _ids: dict[tuple[str, int, torch.device | None], Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def used(self) -> tuple[str, ...]:
        """Every adapter that some row uses."""
        if self.per_row is None or self.names:
            return self.names
        return tuple(dict.fromkeys(name for row in self.per_row for name in row))

    def rows(self, adapter: str, batch: int, device: torch.device | None = None) -> Rows:
        """Return which rows of a batch use `adapter`: None (no row), `ALL`, or a tensor of row numbers (rows,).

        Each name stands for ``batch / len(per_row)`` neighbouring rows: beams of one sample, or the tokens of a flattened batch.
        `device`: where the numbers are to be.

        Raises:
            RoutingError: the batch is no multiple of the number of names.
        """
        if self.per_row is None:
            return ALL if adapter in self.names else None
        key = (adapter, batch, device)
        if key not in self._ids:
            repeat, rest = divmod(batch, len(self.per_row))
            if rest or not repeat:
                raise RoutingError(
                    f"adapter_names has {len(self.per_row)} entries, but a layer sees a batch of {batch} rows",
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
    """The type of `ALL`; as an index it selects every row, as ``slice(None)`` does."""

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


#: the rows of a route that every row of the batch is in; as an index it selects every row
ALL = _All()
Rows = Tensor | _All | None
NO_ROUTE = Route()


class AdapterSelection:
    """The adapters in use, shared by all adapter layers of a model: switching sets one attribute and visits no layer.

    A thread may override it for itself with `use`: concurrent requests do not see one another.

    Args:
        names: the adapters in use.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.selected = Route(tuple(names))
        self.enabled = True
        #: what layers follow unless their thread says otherwise
        self.default = self.selected
        self.local = threading.local()
        #: inside `disabled`, where no layer follows anything, also those that were switched by themselves
        self.suspended = False
        #: adapter → its number
        self.adapter_ids: dict[str, int] = {}
        #: which adapters act, by number: a compiled graph reads this tensor, and is not compiled again when another adapter is chosen
        self.active_mask = torch.zeros(0, dtype=torch.bool)
        #: the model's own, of which this is a variant; itself otherwise
        self.root = self
        #: the names were given as a list, and are shown as one
        self.as_list = False
        #: (names, enabled, as_list) → what layers follow that were switched by themselves, one for all layers in the same state
        self.variants: weakref.WeakValueDictionary[tuple[tuple[str, ...], bool, bool], AdapterSelection] = weakref.WeakValueDictionary()
        #: saved modules that were switched off by themselves; they follow when layers are switched on
        self.switched_off: list[Any] = []
        #: the cache scope that a caller opened for the whole model
        self.scope: CacheScope | None = None
        #: every open scope, those of single threads included
        self.scopes: weakref.WeakSet[CacheScope] = weakref.WeakSet()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters chosen for the whole model, also while they are disabled."""
        return self.selected.names

    def select(self, names: Sequence[str]) -> None:
        """Choose the adapters `names` for the whole model."""
        self.selected = Route(tuple(names))
        self._refresh()

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off, as `enabled` says, without forgetting which were chosen."""
        self.enabled = enabled
        self._refresh()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """No adapter acts inside the block, in layers that were switched by themselves neither."""
        was = self.enabled, self.suspended
        self.suspended = True
        self.enable(False)
        try:
            yield
        finally:
            self.enabled, self.suspended = was
            self._refresh()

    def _refresh(self) -> None:
        self.default = self.selected if self.enabled and not self.root.suspended else NO_ROUTE
        if self.root is self:
            for variant in list(self.variants.values()):
                variant._refresh()
        with torch.inference_mode(False):
            self.active_mask = self._numbers(self.default.names).to(self.active_mask.device)

    def place(self, name: str, device: torch.device) -> None:
        """Give the adapter `name` a number, for the model and all variants. `device`: where its layers are."""
        root = self.root
        if name not in root.adapter_ids:
            root.adapter_ids[name] = len(root.adapter_ids)
            if device.type != "meta":
                root.active_mask = root.active_mask.to(device)
            for variant in root.variants.values():
                variant.active_mask = root.active_mask
            root._refresh()

    def _numbers(self, names: Iterable[str]) -> Tensor:
        numbers = torch.zeros(len(self.adapter_ids), dtype=torch.bool)
        for name in names:
            if name in self.adapter_ids:
                numbers[self.adapter_ids[name]] = True
        return numbers

    def current(self) -> Route:
        """Return the route of the calling thread."""
        # getattr on a threading.local is traced by torch.compile; ContextVar.get would break the graph in every layer
        route: Route | None = getattr(self.local, "route", None)
        return self.default if route is None else route

    @contextlib.contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Follow `route` in this thread until the block ends."""
        previous = getattr(self.local, "route", None)
        if route.active_mask is None and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():  # something may have been compiled
            rows = [route.names] if route.per_row is None else route.per_row
            numbers = torch.stack([self._numbers(names) for names in rows]).to(self.active_mask.device)
            object.__setattr__(route, "active_mask", numbers[0] if route.per_row is None else numbers)
        self.local.route = route
        try:
            yield
        finally:
            self.local.route = previous

    @contextlib.contextmanager
    def use_here(self, route: Route) -> Iterator[None]:
        """Follow `route` until the block ends in this thread; where an event loop runs, in this task and those that it starts, not in its neighbours.

        In a task, `of_task` gives the route: what runs the model follows it with `use` for as long as nothing else can run.
        """
        if asyncio._get_running_loop() is None:
            with self.use(route):
                yield
            return
        token = _TASK_ROUTES.set({**_TASK_ROUTES.get(), id(self): route})
        try:
            yield
        finally:
            _TASK_ROUTES.reset(token)

    def of_task(self) -> Route | None:
        """Return the route that `use_here` chose for this task; None elsewhere."""
        return None if torch.compiler.is_compiling() else _TASK_ROUTES.get().get(id(self))

    # ---- the cache scope ---------------------------------------------------------------------------------------------
    def cache(self) -> CacheScope | None:
        """Return the open cache scope, where this call may use one; None elsewhere. A call with gradients empties it: an optimiser may follow."""
        scope = None if torch.compiler.is_compiling() else self.open_scope()
        if scope is None or may_cache():
            return scope
        if torch.is_grad_enabled():
            scope.clear()
        return None

    def open_scope(self) -> CacheScope | None:
        """Return the open cache scope for a call of which `can_fuse` has just said yes and which has no gradients; other calls ask `cache`."""
        scope: CacheScope | None = getattr(self.local, "cache", None) or self.root.scope
        return None if scope is None or scope.closed else scope

    @contextlib.contextmanager
    def cached(self, *, thread: bool = False) -> Iterator[None]:
        """Open a cache scope until the block ends; where one is open, that one goes on.

        Args:
            thread: for the calling thread alone.
        """
        root = self.root
        if root.scope is not None or getattr(self.local, "cache", None) is not None:
            yield
            return
        scope = CacheScope()
        root.scopes.add(scope)
        if thread:
            self.local.cache = scope
        else:
            root.scope = scope
        try:
            yield
        finally:
            scope.close()
            if thread:
                self.local.cache = None
            else:
                root.scope = None

    def cached_result(self, kind: str, module: nn.Module, compute: Callable[[], T], key: Hashable = None) -> T:
        """Return what `compute` makes of the weights of a module: in an open cache scope computed once, elsewhere in each call.

        Nothing is cached while a part of `module` is in training mode, where it may compute something else each time, or has hooks.

        Args:
            kind: names the result.
            module: from whose parameters and buffers alone it is computed.
            compute: takes nothing, returns a tensor or anything made of tensors.
            key: which of several results of the module.
        """
        scope = self.cache()
        if scope is None or any(part.training or is_observed(part) for part in module.modules()):
            return compute()
        return scope.get((kind, module, key), compute)

    def drop_cached(self) -> None:
        """Empty all open cache scopes; called by every operation of ours that changes a weight, after it has done so."""
        scopes = self.root.scopes
        if scopes:
            for scope in list(scopes):
                scope.clear()

    def begin_training(self) -> None:
        """Close the cache scope of the model with a warning: weights are about to change behind it."""
        scope = self.root.scope
        if scope is not None and not scope.closed:
            scope.close()
            warnings.warn("train() inside of cached(model): nothing is cached from here on", PeftWarning, stacklevel=3)

    def variant(self, names: Sequence[str], enabled: bool, as_list: bool = False) -> AdapterSelection:
        """Return what a layer follows that has another choice than its model; overrides of threads are those of the model.

        Args:
            names: the adapters in use there.
            enabled: whether they are switched on.
            as_list: the names were given as a list, and are shown as one.
        """
        root = self.root
        key = (tuple(names), enabled, as_list)
        found = root.variants.get(key)
        if found is None:
            found = AdapterSelection(names)
            found.root, found.local, found.as_list = root, root.local, as_list
            found.adapter_ids, found.active_mask = root.adapter_ids, root.active_mask
            found.enable(enabled)
            root.variants[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = {
            "names": self.names,
            "enabled": self.enabled,
            "as_list": self.as_list,
            "adapter_ids": self.adapter_ids,
            "device": str(self.active_mask.device),
        }
        return {**state, "switched_off": self.switched_off} if self.root is self else {**state, "root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["names"])  # type: ignore[misc]
        self.as_list, self.adapter_ids, self.active_mask = state["as_list"], dict(state["adapter_ids"]), self.active_mask.to(state["device"])
        self.switched_off = state.get("switched_off", [])
        self._join(state.get("root", self), state["enabled"])

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterSelection:
        twin = memo[id(self)] = AdapterSelection(copy.deepcopy(self.names))
        twin.as_list, twin.adapter_ids, twin.active_mask = self.as_list, dict(self.adapter_ids), self.active_mask
        twin.switched_off = copy.deepcopy(self.switched_off, memo)
        twin._join(twin if self.root is self else copy.deepcopy(self.root, memo), self.enabled)
        return twin

    def _join(self, root: AdapterSelection, enabled: bool) -> None:
        if root is not self:
            self.root, self.local, self.adapter_ids = root, root.local, root.adapter_ids
            root.variants[self.names, enabled, self.as_list] = self
        self.enable(enabled)


def read_names(names: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """Turn ``["a", "__base__", ["a", "b"]]`` into one tuple of adapters per row.

    Raises:
        RoutingError: an entry is neither a name nor a list of names.
    """
    if isinstance(names, str):
        raise RoutingError(f"adapter_names={names!r} is one name", hint="give a list with one entry per sample")
    given = tuple(names)
    if torch.compiler.is_compiling():
        return _rows(given)
    try:
        return _remembered(given)  # servers send the same rows step by step
    except TypeError:  # lists among the entries
        return _rows(given)


def _rows(names: tuple[Any, ...]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for position, entry in enumerate(names):
        members = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, (list, tuple)) else None
        if members is None or not all(isinstance(member, str) for member in members):
            raise RoutingError(f"adapter_names[{position}]={entry!r} is no adapter name", hint="give names, or lists of names")
        rows.append(tuple(member for member in members if member != BASE))
    return tuple(rows)


_remembered = functools.lru_cache(maxsize=16)(_rows)
