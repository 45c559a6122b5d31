"""Which adapters are used in a forward pass: one selection object per model, which every layer reads and each thread can override."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base.plain import is_observed
from ..errors import PeftWarning
from .cache import CacheScope, may_cache
from .route import NO_ROUTE, Route

T = TypeVar("T")

#: id of a selection → the route that the current asyncio task uses for it
_TASK_ROUTES: contextvars.ContextVar[Mapping[Any, Any]] = contextvars.ContextVar("peft_core_task_routes", default=MappingProxyType({}))


class AdapterSelection:
    """The active adapters, shared by all adapter layers of a model: switching adapters sets one attribute and does not loop over layers.

    A thread can override the selection for itself with `use`, so that concurrent requests do not affect each other.

    Args:
        names: the names of the active adapters.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.selected = Route(tuple(names))
        self.enabled = True
        #: the route of threads without an override
        self.default = self.selected
        self.local = threading.local()
        #: True inside `disabled()`: adapters are off in every layer, also in those that were switched individually
        self.suspended = False
        #: how often layers were switched individually
        self._switches = 0
        #: adapter name → its index in `active_mask`
        self.adapter_ids: dict[str, int] = {}
        #: mask of the active adapters, bool (adapters,): compiled graphs read it, so that switching adapters does not recompile
        self.active_mask = torch.zeros(0, dtype=torch.bool)
        #: the active adapters if they are not in load order, else (): compiled graphs depend on this order, but not on which adapters are active
        self.reordered: tuple[str, ...] = ()
        #: the selection of the whole model; `self`, unless this is a variant
        self.root = self
        #: (names, enabled) → the selection of layers that were switched individually; layers in the same state share one
        self.variants: weakref.WeakValueDictionary[tuple[tuple[str, ...], bool], AdapterSelection] = weakref.WeakValueDictionary()
        #: saved modules that were disabled individually; they are enabled again when an adapter layer is
        self.switched_off: list[Any] = []
        #: the cache scope that a caller opened for the whole model
        self.scope: CacheScope | None = None
        #: every open cache scope, including those opened for single threads
        self.scopes: weakref.WeakSet[CacheScope] = weakref.WeakSet()

    @property
    def switches(self) -> int | None:
        """How often layers were switched individually; None if all layers currently follow the model's selection."""
        return self._switches if self.variants and not self.suspended else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters selected for the whole model, in the order in which they are applied, also while they are disabled."""
        return self.selected.names

    def select(self, names: Sequence[str]) -> None:
        """Select the adapters `names` for the whole model."""
        self.selected = Route(tuple(names))
        self._refresh()

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on if `enabled` is True, else off; the selected names are not changed."""
        self.enabled = enabled
        self._refresh()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters inside the block, also in layers that were switched individually."""
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
        numbers = [self.adapter_ids.get(name, -1) for name in self.default.names]
        self.reordered = () if numbers == sorted(numbers) else self.default.names
        if self.root is self:
            for variant in list(self.variants.values()):
                variant._refresh()
        with torch.inference_mode(False):
            self.active_mask = self._numbers(self.default.names).to(self.active_mask.device)

    def register_adapter(self, name: str, device: torch.device) -> None:
        """Assign the adapter `name` an index into `active_mask`, shared with all variants.

        Args:
            name: the name of the adapter.
            device: the device of the adapter's layers; `active_mask` is moved to this device, unless it is the meta device.
        """
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
        # torch.compile can trace getattr on a threading.local; ContextVar.get would cause a graph break in every layer
        route: Route | None = getattr(self.local, "route", None)
        return self.default if route is None else route

    @contextlib.contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Use `route` in the calling thread until the block ends."""
        previous = getattr(self.local, "route", None)
        if route.active_mask is None and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():  # compiled graphs may exist
            rows = [route.names] if route.per_row is None else route.per_row
            numbers = torch.stack([self._numbers(names) for names in rows]).to(self.active_mask.device)
            object.__setattr__(route, "active_mask", numbers[0] if route.per_row is None else numbers)
        self.local.route = route
        try:
            yield
        finally:
            self.local.route = previous

    @contextlib.contextmanager
    def use_in_context(self, route: Route) -> Iterator[None]:
        """Use `route` inside the block: in the current thread or, under a running event loop, in the current task and the tasks that it creates.

        Under an event loop this only stores the route. The code that calls the model reads it with `task_route` and applies it with `use`, without
        awaiting inside.
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

    def task_route(self) -> Route | None:
        """Return the route that `use_in_context` stored for the current asyncio task; None if there is none, or during compilation."""
        return None if torch.compiler.is_compiling() else _TASK_ROUTES.get().get(id(self))

    # ---- the cache scope ---------------------------------------------------------------------------------------------
    def cache(self) -> CacheScope | None:
        """Return the open cache scope, or None if there is none or this call must not use it (gradients, tracing, compilation).

        Clears the scope if gradients are enabled, since an optimiser step may follow.
        """
        scope = None if torch.compiler.is_compiling() else self.open_scope()
        if scope is None or may_cache():
            return scope
        if torch.is_grad_enabled():
            scope.clear()
        return None

    def open_scope(self) -> CacheScope | None:
        """Return the open cache scope, or None, without checking whether this call may use it.

        Call this only if `can_fuse` returned True and gradients are disabled; otherwise call `cache`.
        """
        scope: CacheScope | None = getattr(self.local, "cache", None) or self.root.scope
        return None if scope is None or scope.closed else scope

    @contextlib.contextmanager
    def cached(self, *, thread: bool = False) -> Iterator[None]:
        """Open a cache scope until the block ends; if a scope is already open, use that one.

        Args:
            thread: open the scope only for the calling thread.
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
        """Return the result of ``compute()``; while a cache scope is open, the result is cached.

        Nothing is cached if `module` or one of its submodules is in training mode, where each call may give a different result, or has hooks.

        Args:
            kind: name of the kind of result.
            module: the module on whose parameters and buffers, and nothing else, the result depends.
            compute: function without arguments that returns a tensor or a structure of tensors.
            key: distinguishes several results of the same module and kind.
        """
        scope = self.cache()
        if scope is None or any(part.training or is_observed(part) for part in module.modules()):
            return compute()
        return scope.get((kind, module, key), compute)

    def drop_cached(self) -> None:
        """Empty all open cache scopes. Call it after every change of a weight."""
        scopes = self.root.scopes
        if scopes:
            for scope in list(scopes):
                scope.clear()

    def begin_training(self) -> None:
        """Close the cache scope of the model and warn: training will change weights, which would make the cached values stale."""
        scope = self.root.scope
        if scope is not None and not scope.closed:
            scope.close()
            warnings.warn("train() was called inside cached(model); nothing is cached from here on", PeftWarning, stacklevel=3)

    def variant(self, names: Sequence[str], enabled: bool) -> AdapterSelection:
        """Return a selection for layers whose active adapters differ from the model's. It shares thread-local overrides with the model's selection.

        Args:
            names: the active adapters of these layers.
            enabled: whether adapters are switched on in these layers.
        """
        root = self.root
        root._switches += 1
        key = (tuple(names), enabled)
        found = root.variants.get(key)
        if found is None:
            found = AdapterSelection(names)
            found.root, found.local = root, root.local
            found.adapter_ids, found.active_mask = root.adapter_ids, root.active_mask
            found.enable(enabled)
            root.variants[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = {
            "names": self.names,
            "enabled": self.enabled,
            "adapter_ids": self.adapter_ids,
            "device": str(self.active_mask.device),
        }
        return {**state, "switched_off": self.switched_off} if self.root is self else {**state, "root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["names"])  # type: ignore[misc]
        self.adapter_ids, self.active_mask = dict(state["adapter_ids"]), self.active_mask.to(state["device"])
        self.switched_off = state.get("switched_off", [])
        self._join(state.get("root", self), state["enabled"])

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterSelection:
        twin = memo[id(self)] = AdapterSelection(copy.deepcopy(self.names))
        twin.adapter_ids, twin.active_mask = dict(self.adapter_ids), self.active_mask
        twin.switched_off = copy.deepcopy(self.switched_off, memo)
        twin._join(twin if self.root is self else copy.deepcopy(self.root, memo), self.enabled)
        return twin

    def _join(self, root: AdapterSelection, enabled: bool) -> None:
        if root is not self:
            self.root, self.local, self.adapter_ids = root, root.local, root.adapter_ids
            root.variants[self.names, enabled] = self
        self.enable(enabled)
