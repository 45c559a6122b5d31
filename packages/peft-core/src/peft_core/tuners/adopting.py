"""Whether a model has adapters already, and still."""

from __future__ import annotations

from typing import Any

from torch import nn

from .index import AdapterIndex, Key, index_of


def adopt(model: nn.Module) -> tuple[AdapterIndex, bool]:
    """Return the index of a base model and whether it is new. A model that already has one keeps it.

    Where somebody else took the last config out and the wrappers off, as libraries that know layers do, there is nothing to keep.
    """
    found = index_of(model)
    wrapped = [key for key in found.entries if key[0]] if found is not None and not found.configs else []
    if found is not None and wrapped and not any(_in_place(found, key) for key in wrapped):
        found.retire()
        found = None
    return (found, False) if found is not None else (AdapterIndex(model), True)


def _in_place(index: AdapterIndex, key: Key) -> bool:
    module = index.entries[key]
    for parent, leaf in index.view.sites.get(key[1], ()):
        found: Any = getattr(parent, leaf, None)
        while found is not None and found is not module:
            inside = found._modules
            found = inside.get("base_layer") or inside.get("original_module")
        if found is module:
            return True
    return False
