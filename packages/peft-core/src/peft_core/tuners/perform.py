"""From plans to a changed model, each step with its undo."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import MergeError, UnsupportedModuleError, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.creation import Creation
from ..layers.slots import LeavesBehind, Slot
from ..layers.token_rows import RowsLayer
from .tuner import Plan, TunerBase, Wrap

if TYPE_CHECKING:
    from .index import AdapterIndex, Key


class Undo:
    """A stack of undo steps, run in reverse when the block fails. Plain tuples: a large model pushes thousands of them.

    Example:
        >>> with Undo() as undo:
        ...     flags.append(1)
        ...     undo.call(flags.pop)
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call(self, step: Callable[..., Any], *args: Any) -> None:
        """Remember how to undo what was just done."""
        self._steps.append((step, args))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            for step, args in reversed(self._steps):
                step(*args)
        self._steps.clear()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from running inside the block.

    Each of its full runs visits every object of the growing model, so that a model twice as large would take more than twice as long.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class MountedModules(nn.ModuleDict):
    """Modules beside the base, one per adapter: `<mount>.<adapter>`, whatever tuner made them. Each has `slots()`.

    Who puts another module in the place of one, as FullyShardedDataParallel does, reaches the tuner with it: `TunerBase.mounted` follows.
    """

    def __init__(self) -> None:
        super().__init__()
        #: adapter → the mapping in which its tuner looks its module up
        self._known: dict[str, dict[str, nn.Module]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self._known:
            self._known[name][name] = value

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have a module here."""
        return tuple(self)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Return all parameters of the adapter's module."""
        return dict(self[adapter].named_parameters())

    def slots(self, adapter: str) -> dict[str, Slot]:
        """Return what the adapter's module says that a file holds."""
        found: dict[str, Slot] = self[adapter].slots()  # type: ignore[operator]
        return found

    def drop(self, adapter: str) -> None:
        """Remove the adapter's module."""
        if adapter in self:
            del self[adapter]
            self._known.pop(adapter, {}).pop(adapter, None)


def perform(
    index: AdapterIndex,
    kind: str,
    tuner: TunerBase,
    plan: Plan,
    adapter: str,
    creation: Creation,
    mount_on: nn.Module | None,
    keys: list[Key],
    undo: Undo,
) -> None:
    """Do what a plan says for one adapter; append the touched entries of the index to `keys`."""
    for wrap in plan.wraps:
        key = (kind, wrap.path)
        module: Any = index.entries.get(key)
        if module is None:
            occupant = _occupant(index, wrap.path)
            if occupant is not index.view.modules[wrap.path] and isinstance(occupant, LeavesBehind):
                raise UnsupportedModuleError(
                    f"{wrap.path!r} is saved whole by {listed(occupant.adapters())}, so that {adapter!r} can't wrap it",
                    hint="leave it out of the targets with exclude_modules, or add the adapters in the other order",
                )
            _put(index, key, occupant, wrap, undo)
            module = index.entries[key]
        undo.call(module.drop, adapter)
        wrap.fill(module, creation)
        keys.append(key)
    for path, mount in plan.mounts.items():
        assert mount_on is not None
        key = ("", path)
        holder = index.entries.get(key)
        if holder is None:
            holder = MountedModules()
            mount_on.add_module(path, holder)
            undo.call(mount_on._modules.pop, path, None)
            index.entries[key] = holder
            undo.call(index.entries.pop, key, None)
        assert isinstance(holder, MountedModules)
        module = mount(creation).requires_grad_(False)
        module.train(mount_on.training)
        holder._known[adapter] = mounted = tuner.mounted.setdefault(path, {})
        holder[adapter] = mounted[adapter] = module
        undo.call(holder.drop, adapter)
        keys.append(key)
    for path, adopt in plan.adopts.items():
        key = (kind, path)
        module = adopt()
        for parameter in module.parameters_of(adapter).values():
            undo.call(parameter.requires_grad_, parameter.requires_grad)
        undo.call(module.drop, adapter)
        index.entries[key] = module
        keys.append(key)


def _put(index: AdapterIndex, key: Key, occupant: nn.Module, wrap: Wrap, undo: Undo) -> None:
    """Put a new wrapper around what is there, or, where rows of it train, inside what writes those: that stays outermost, and is merged last."""
    if not isinstance(occupant, RowsLayer):
        module: Any = wrap.build(occupant)
        _place(index, wrap.path, module, undo)
    else:
        inside = occupant.wrapped
        module = wrap.build(inside)
        if isinstance(module, LeavesBehind):
            raise UnsupportedModuleError(
                f"rows of {wrap.path!r} train in {listed(occupant.adapters())}, so that it can't be saved whole",
                hint="leave it out of modules_to_save, or delete_adapter the other one",
            )
        occupant.put_inside(module)
        undo.call(occupant.put_inside, inside)
        _prepare(index, wrap.path, module)
    index.entries[key] = module
    undo.call(index.entries.pop, key, None)
    if isinstance(occupant, RowsLayer):
        for other in [other for other, entry in index.entries.items() if entry is occupant]:
            index.entries[other] = index.entries.pop(other)


def _occupant(index: AdapterIndex, path: str) -> nn.Module:
    parent, leaf = index.view.sites[path][0]
    found: nn.Module = getattr(parent, leaf)
    return found


def _place(index: AdapterIndex, path: str, module: Any, undo: Undo) -> None:
    for parent, leaf in index.view.sites[path]:
        before = parent._modules[leaf]
        parent._modules[leaf] = module
        undo.call(parent._modules.__setitem__, leaf, before)
    _prepare(index, path, module)


def _prepare(index: AdapterIndex, path: str, module: Any) -> None:
    occupied = index.view.modules[path]
    module.train(occupied.training)
    if isinstance(module, AdapterLayer):
        weight = occupied._parameters.get(module.weight_name)
        module.shared_weight = weight is not None and id(weight) in index.view.shared_weights


def leave_modules(index: AdapterIndex, adapter: str, paths: Collection[str]) -> None:
    """Take an adapter out of some of the modules that it wraps; a wrapper that no adapter uses any more is taken off.

    Args:
        index: the adapters of a model.
        adapter: which one.
        paths: original names of modules; those that it does not wrap are ignored.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        MergeError: it is merged.
    """
    index.require(adapter)
    if adapter in index.merged_adapters():
        raise MergeError(f"the adapter {adapter!r} is merged and can't leave modules", hint="unmerge_adapter() first")
    kind = str(index.configs[adapter].peft_type)
    for key in [key for key in index.own[adapter] if key[0] == kind and key[1] in paths]:
        index.own[adapter].remove(key)
        index.entries[key].drop(adapter)
        _take_off(index, key)


def _take_off(index: AdapterIndex, key: Key) -> None:
    """Put what a wrapper wraps in its place, if the wrapper holds no adapter any more. One inside another wrapper stays: it does nothing."""
    module: Any = index.entries[key]
    if not isinstance(module, AdapterLayer) or module.adapters() or _occupant(index, key[1]) is not module:
        return
    for parent, leaf in index.view.sites[key[1]]:
        parent._modules[leaf] = module.wrapped
    del index.entries[key]
