"""The tensors of an adapter by their keys in its file, and by their names in the model's own state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..base.wrappers import is_sharded, unwrapped
from ..layers.slots import Slot
from ..plugins.registry import registry
from ..tensor_names import PARALLEL_PREFIX, file_key, found_under, has_part, in_base, join, visible
from ..tuners.index import AdapterIndex
from ..tuners.saved_modules import SAVED

EMPTY: Mapping[str, Slot] = MappingProxyType({})


def keyed_slots(index: AdapterIndex, adapter: str, *, wrapped: bool = True) -> dict[str, Slot]:
    """Return key on disk → slot for everything that a file holds of an adapter.

    Args:
        index: the adapters of a model.
        adapter: which one.
        wrapped: as a `PeftModel` writes it; False: as a bare model with injected adapters does (no prefix).
    """
    prefix = index.prefix(adapter) if wrapped else ""
    keyed = {}
    # heads that the task brings, of a config that can't name them: the reference implementation has none in such files
    names_them = "modules_to_save" in registry.config_class(index.tuner(adapter).spec.peft_type).__dataclass_fields__  # type: ignore[attr-defined]
    implied = {path for (kind, path), _ in index.modules_of(adapter) if kind == SAVED} if not names_them else ()
    for path, end, slot in index.slots(adapter):
        if path in implied:
            slot = replace(slot, optional=True)
        if slot.stands_for:
            slot = replace(slot, stands_for=tuple(file_key(prefix, path, other) for other in slot.stands_for))
        keyed[file_key(prefix, path, end)] = slot
    return keyed


def adapter_tensors(
    index: AdapterIndex,
    adapter: str,
    *,
    wrapped: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    further: Mapping[str, Slot] = EMPTY,
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, detached, not copied.

    Args:
        index, adapter, wrapped: as `keyed_slots`.
        state_dict: take the tensors from here (in-memory names of `model`) instead of from the model; ones that it lacks from the model.
        model: what `state_dict` was taken of; others may have put wrappers around it. In FSDP1 its own state dict is taken where none is given,
            of the kind that `FullyShardedDataParallel.state_dict_type` says; every process has to call this, and the result is empty where
            that is.
        further: more that is to be in the file: key → slot.
    """
    model = index.base if model is None else model
    slots = {key: slot for key, slot in keyed_slots(index, adapter, wrapped=wrapped).items() if not slot.unread} | dict(further)
    if state_dict is None and is_sharded(model):
        state_dict = model.state_dict()
        if not state_dict:
            return {}
    if state_dict is None:
        return {key: slot.read() for key, slot in slots.items()}
    given = {visible(name): value for name, value in state_dict.items()}
    names = names_by_module(model)
    tensors = {}
    for key, slot in slots.items():
        found = None
        if slot.owner is not None and id(slot.owner[0]) in names:
            found = found_under(join(names[id(slot.owner[0])], slot.owner[1]), given)
        tensors[key] = slot.read() if found is None else found.detach()
    return tensors


def names_by_module(model: nn.Module) -> dict[int, str]:
    """Return id of a module → its name in `model`, from inside the wrappers that others have put around the model and its parts."""
    return {id(module): visible(name) for name, module in unwrapped(model).named_modules()}


def names_in_memory(index: AdapterIndex, adapter: str, slots: Mapping[str, Slot], names: Iterable[str]) -> dict[str, str]:
    """Return name → key on disk, of those names that are an adapter's tensors as the model's own state dict calls them.

    Args:
        index, adapter: whose tensors.
        slots: key on disk → slot.
        names: to look for.
    """
    base_names = {name: in_base(name) for name in names}
    if not any(has_part(base_name, adapter) for base_name in base_names.values()):
        return {}
    paths = names_by_module(index.base)
    owners = {key: slot.owner for key, slot in slots.items() if slot.owner is not None}
    keys = {join(paths[id(module)], attribute): key for key, (module, attribute) in owners.items() if id(module) in paths}
    return {name: key for name, base_name in base_names.items() if (key := keys.get(base_name) or keys.get(base_name.removeprefix(PARALLEL_PREFIX)))}
