"""Maps from keys in an adapter file, and from names in the model's state dict, to the tensors of an adapter."""

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
    """Return {key in the file: slot} for all tensors of an adapter that a file stores.

    Args:
        index: the adapters of a model.
        adapter: name of the adapter.
        wrapped: True: keys with the prefix that a `PeftModel` writes; False: keys of a model with injected adapters (no prefix).
    """
    prefix = index.prefix(adapter) if wrapped else ""
    keyed = {}
    # heads that the task adds although the config has no modules_to_save: files of the reference implementation lack them
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
        index, adapter, wrapped: as in `keyed_slots`.
        state_dict: state dict of `model` (in-memory names) from which the tensors are taken; tensors that it lacks are taken from the model.
        model: the model from which `state_dict` was taken; other wrappers may be around it. If it is sharded by FSDP1 and `state_dict` is None, its
            state dict is computed, of the type set with `FullyShardedDataParallel.state_dict_type`; then every process has to call this function,
            and on processes where this state dict is empty the result is empty, too.
        further: slots of additional tensors for the file: key → slot.
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
    """Return {id of a module: its name in `model`}; names do not contain the wrappers that other libraries put around the model or its parts."""
    return {id(module): visible(name) for name, module in unwrapped(model).named_modules()}


def names_in_memory(index: AdapterIndex, adapter: str, slots: Mapping[str, Slot], names: Iterable[str]) -> dict[str, str]:
    """Return {name: key in the file} for those of `names` that are names of an adapter's tensors in the model's state dict.

    Args:
        index, adapter: the adapters of the model, and the name of the adapter.
        slots: key in the file → slot.
        names: the names to look up.
    """
    base_names = {name: in_base(name) for name in names}
    if not any(has_part(base_name, adapter) for base_name in base_names.values()):
        return {}
    paths = names_by_module(index.base)
    owners = {key: slot.owner for key, slot in slots.items() if slot.owner is not None}
    keys = {join(paths[id(module)], attribute): key for key, (module, attribute) in owners.items() if id(module) in paths}
    return {name: key for name, base_name in base_names.items() if (key := keys.get(base_name) or keys.get(base_name.removeprefix(PARALLEL_PREFIX)))}
