"""Names on disk ⇄ tensors in the model, made from slots and paths. No other file builds or cuts a key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import ConfigError
from ..layers.slots import Slot
from ..plugins.registry import registry
from ..tuners.index import AdapterIndex
from ..tuners.saved_modules import SAVED

#: what wrapped models put before the path of a base module; removed where there is no wrapper
WRAPPER_PREFIX = "base_model.model."
_T = TypeVar("_T")


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


def file_key(prefix: str, path: str | None, end: str) -> str:
    """Return the key of one tensor in a file.

    Args:
        prefix: what stands before paths in the base (`TunerSpec.base_prefix`); empty without a wrapper.
        path: of the module in the base; None for what is mounted beside it.
        end: the end of the key, as the module's slots name it.
    """
    if path is None:
        return end
    return f"{prefix}{path}.{end}" if path else f"{prefix}{end}"


def adapter_tensors(
    index: AdapterIndex, adapter: str, *, wrapped: bool = True, state_dict: Mapping[str, Any] | None = None, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, detached, not copied.

    Args:
        index, adapter, wrapped: as `keyed_slots`.
        state_dict: take the tensors from here (in-memory names of `model`) instead of from the model; ones that it lacks from the model.
        model: what `state_dict` was taken of.
    """
    slots = {key: slot for key, slot in keyed_slots(index, adapter, wrapped=wrapped).items() if not slot.unread}
    if state_dict is None:
        return {key: slot.read() for key, slot in slots.items()}
    names = {id(module): name for name, module in (model or index.base).named_modules()}
    tensors = {}
    for key, slot in slots.items():
        found = None
        if slot.owner is not None and id(slot.owner[0]) in names:
            prefix = names[id(slot.owner[0])]
            found = state_dict.get(f"{prefix}.{slot.owner[1]}" if prefix else slot.owner[1])
        tensors[key] = slot.read() if found is None else found.detach()
    return tensors


def names_in_memory(index: AdapterIndex, adapter: str, slots: Mapping[str, Slot], names: Iterable[str]) -> dict[str, str]:
    """Return name → key on disk, of those names that are an adapter's tensors as the model's own state dict calls them.

    Args:
        index, adapter: whose tensors.
        slots: key on disk → slot.
        names: to look for.
    """
    unsure = {name: name.replace("_orig_mod.", "").removeprefix(WRAPPER_PREFIX) for name in names}
    if not any(adapter in stem.split(".") for stem in unsure.values()):
        return {}
    paths = {id(module): path for path, module in index.base.named_modules()}
    keys = {
        f"{paths[id(slot.owner[0])]}.{slot.owner[1]}": key for key, slot in slots.items() if slot.owner is not None and id(slot.owner[0]) in paths
    }
    return {name: keys[stem] for name, stem in unsure.items() if stem in keys}


def key_renamer(key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    """Return what renames the keys of a file: each pattern is applied behind `base_model.model.`, which is put back.

    Raises:
        ConfigError: a pattern is no regular expression.
    """
    if not key_mapping:
        return lambda key: key
    try:
        rules = [(re.compile(pattern), replacement) for pattern, replacement in key_mapping.items()]
    except re.error as error:
        raise ConfigError(f"key_mapping: {error}", hint="keys are regular expressions, values replacements") from error

    def rename(key: str) -> str:
        stem = key.removeprefix(WRAPPER_PREFIX)
        for pattern, replacement in rules:
            stem, count = pattern.subn(replacement, stem)
            if count:
                break
        return WRAPPER_PREFIX + stem if key.startswith(WRAPPER_PREFIX) else stem

    return rename


def without_adapter(key: str, adapter: str, prefix: str) -> str:
    """Return a name of a tensor in memory as files have it: without the adapter's name behind a parameter with this prefix.

    ``torch.compile``'s own part of the name goes, too.
    """
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    for place, (part, following) in enumerate(itertools.pairwise(parts)):
        if part.startswith(prefix) and following == adapter:
            del parts[place + 1]
            break
    return ".".join(parts)


def fitted_keys(tensors: Mapping[str, _T], expected: Iterable[str]) -> dict[str, _T]:
    """Return the tensors under the names that are expected, where only the wrapper's prefix differs (bare and wrapped models)."""
    expected = set(expected)
    renamed = {}
    for key, value in tensors.items():
        for candidate in (key, WRAPPER_PREFIX + key, key.removeprefix(WRAPPER_PREFIX)):
            if candidate in expected:
                renamed[candidate] = value
                break
        else:
            renamed[key] = value
    return renamed
