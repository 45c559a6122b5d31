"""Folding adapters into the base weights and taking them out: over the whole model, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..base.undo import collector_paused
from ..errors import MergeError, PeftWarning, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.slots import LeavesBehind
from ..merging.layer import refuse_wrong_order
from ..plugins import Capability, hooks
from ..tuners.index import AdapterIndex
from ..tuners.tokens import refuse_common_rows
from . import reshape
from .delete import retire


def merge(index: AdapterIndex, adapters: Sequence[str] | None, *, safe: bool = False, progress: bool = False) -> None:
    """Fold adapters into the base weights; all or nothing.

    Args:
        adapters: None: those in use.
        safe: refuse results that are not finite.
        progress: show a progress bar.

    Raises:
        AdapterNotFoundError, CapabilityError: before anything changes.
        MergeError: a result is not finite, or two adapters have rows of the same tokens; nothing is changed then.
    """
    chosen = index.active if adapters is None else tuple(adapters)
    index.require(*chosen)
    for adapter in chosen:
        index.require_capability(adapter, Capability.MERGE, "merged")
    already = [name for name in index.merged_adapters() if name in chosen]
    if already:
        warnings.warn(f"{listed(already)} are already merged, which is not repeated", PeftWarning, stacklevel=4)
    refuse_common_rows(index, (*index.merged_adapters(), *chosen), MergeError)
    if chosen:
        reshape.refuse_merge(index)
    layers = [module for module in index.modules.values() if isinstance(module, AdapterLayer)]
    for layer in layers:
        refuse_wrong_order(layer, chosen)
    done: list[AdapterLayer] = []
    try:
        with collector_paused():
            for layer in _progress(layers, "merging", progress):
                before = len(layer.merging.merges)
                layer.merge(safe, chosen)
                if len(layer.merging.merges) > before:
                    done.append(layer)
    except BaseException:
        for layer in reversed(done):
            layer.merging.undo_last()
        raise
    folded = tuple(name for name in dict.fromkeys(chosen) if any(name in layer.merging.merges[-1].adapters for layer in done))
    if folded:
        index.selection.drop_cached()
        hooks.adapter_merged(index.base, folded)


def unmerge(index: AdapterIndex) -> None:
    """Take out all merged adapters, in reverse."""
    merged = tuple(index.merged_adapters())
    with collector_paused():
        for module in reversed(list(index.modules.values())):
            if isinstance(module, AdapterLayer):
                module.unmerge()
    if merged:
        hooks.adapter_unmerged(index.base, merged)


def unload(
    index: AdapterIndex, *, fold: bool = False, adapters: Sequence[str] | None = None, safe: bool = False, progress: bool = False
) -> nn.Module:
    """Take all wrappers off, after merging if asked, and return the base.

    Args:
        fold: merge the adapters first; saved modules in use take the place of the originals.
        adapters: which to merge; None: those in use.
        safe: refuse results that are not finite.
        progress: show a progress bar.

    Raises:
        as `merge`.
    """
    if fold:
        merge(index, adapters, safe=safe, progress=progress)
        kept = index.active if adapters is None else tuple(adapters)
    else:
        unmerge(index)
        kept = index.active
    names, folded = tuple(index.configs), tuple(index.merged_adapters())
    replaced: dict[str, nn.Module] = {}
    for (_, path), module in index.modules.items():
        if isinstance(module, LeavesBehind):
            replaced[path] = module.remains(kept)
        elif isinstance(module, AdapterLayer):
            for adapter in [name for name in module.merging.shifts if name not in module.merged_adapters]:
                module.merging.restore(adapter)  # only what is merged may leave the base weight as its initialisation changed it
    for module in index.modules.values():
        if isinstance(module, AdapterLayer):
            module.merging.settle()
    for path in {path for kind, path in index.modules if kind and path}:
        for parent, leaf in index.view.sites.get(path, ()):
            setattr(parent, leaf, replaced.get(path, index.view.modules[path]))
    reshape.restore(index)
    retire(index)
    if fold:
        _untie(index.base)
    hooks.adapter_unloaded(index.base, names, folded)
    return index.base


def _untie(model: nn.Module) -> None:
    """Say in the config that input and output embeddings differ, where an adapter made them: readers would drop one of them."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    first, last = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if first is not None and last is not None and first.weight is not last.weight:
        warnings.warn(
            "input and output embeddings are not tied any more, since an adapter was merged into one of them; tie_word_embeddings is False now",
            PeftWarning,
            stacklevel=5,
        )
        config.tie_word_embeddings = False


def _progress(items: Sequence[Any], what: str, show: bool) -> Any:
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what)
