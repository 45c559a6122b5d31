"""Deletes adapters from a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from ..calls import backbone, checkpointing, generation
from ..errors import MergeError, PeftWarning
from ..layers.adapter_layer import AdapterLayer
from ..plugins import hooks
from ..selection.switching import SelectionMixin, let_train
from ..tuners.index import ATTRIBUTE, AdapterIndex, Key
from . import reshape


def delete(index: AdapterIndex, adapter: str) -> None:
    """Delete the weights and the config of an adapter. If it was the only active one, the first remaining adapter is activated, with a warning.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        MergeError: the adapter is merged.
    """
    index.require(adapter)
    if adapter in index.merged_adapters():
        raise MergeError(f"cannot delete the adapter {adapter!r} while it is merged", hint="unmerge_adapter() first")
    for (kind, path), module in index.modules_of(adapter):
        module.drop(adapter)
        if not kind:  # a module mounted beside the base
            for tuner in index.tuners.values():
                tuner.mounted.get(path, {}).pop(adapter, None)
        if isinstance(module, SelectionMixin) and module.selection is not index.selection:  # active adapters set for this module only
            module.stop_using(adapter)
    del index.keys_by_adapter[adapter], index.configs[adapter]
    active = before = index.selection.names
    if adapter in active:
        rest = tuple(name for name in active if name != adapter)
        if rest or not index.configs:
            index.selection.select(rest)
        else:
            first = next(iter(index.configs))
            warnings.warn(f"the active adapter {adapter!r} was deleted; {first!r} is active now", PeftWarning, stacklevel=4)
            index.selection.select((first,))
            let_train(index.parameters_of(first), not index.configs[first].inference_mode)
    reshape.restore_when_unused(index)
    index.refresh()
    if index.selection.names and index.selection.names != before:
        hooks.adapter_activated(index.base, index.selection.names)
    hooks.adapter_deleted(index.base, adapter)


def remove_index(index: AdapterIndex) -> None:
    """Delete all records of adapters, all hooks and all mounted modules from the base. The wrappers must have been replaced before."""
    generation.uninstall(index.base)
    backbone.uninstall(index)
    checkpointing.uninstall(index.base)
    for name in (ATTRIBUTE, "peft_config"):
        index.base.__dict__.pop(name, None)
    for (kind, path), module in index.modules.items():
        mounted: Any = index.base._modules.get(path)
        if not kind and mounted is module:  # without a `PeftModel`, mounted modules are children of the base
            del index.base._modules[path]
    index.modules.clear()
    index.keys_by_adapter.clear()
    index.configs.clear()
    index.selection.select(())
    index.refresh()


def remove_from_modules(index: AdapterIndex, adapter: str, paths: Collection[str]) -> None:
    """Remove an adapter from some of the modules that it wraps. A wrapper that no adapter uses any more is removed.

    Args:
        index: the adapters of a model.
        adapter: the name of the adapter.
        paths: the original names of modules; names of modules that the adapter does not wrap are ignored.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        MergeError: the adapter is merged.
    """
    index.require(adapter)
    if adapter in index.merged_adapters():
        raise MergeError(f"the adapter {adapter!r} is merged and can't leave modules", hint="unmerge_adapter() first")
    kind = str(index.configs[adapter].peft_type)
    for key in [key for key in index.keys_by_adapter[adapter] if key[0] == kind and key[1] in paths]:
        index.keys_by_adapter[adapter].remove(key)
        index.modules[key].drop(adapter)
        _unwrap_if_unused(index, key)


def _unwrap_if_unused(index: AdapterIndex, key: Key) -> None:
    """Replace a wrapper without adapters by the module that it wraps. A wrapper inside another wrapper stays: without adapters it has no effect."""
    module: Any = index.modules[key]
    if not isinstance(module, AdapterLayer) or module.adapters() or index.view.occupant(key[1]) is not module:
        return
    for parent, leaf in index.view.sites[key[1]]:
        parent._modules[leaf] = module.wrapped
    del index.modules[key]
