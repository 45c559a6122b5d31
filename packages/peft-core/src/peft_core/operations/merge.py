"""Merges adapters into the base weights of the whole model (all layers, or none if one fails), unmerges and unloads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..base.undo import collector_paused
from ..errors import MergeError, PeftWarning, listed
from ..layers.adapter_layer import AdapterLayer
from ..layers.slots import AdapterModule, LeavesBehind
from ..merging.layer import layers_inside, refuse_wrong_order
from ..plugins import Capability, hooks
from ..selection.switching import SelectionMixin
from ..tuners.index import AdapterIndex
from ..tuners.tokens import refuse_common_rows
from . import reshape
from .delete import remove_index


def merge(index: AdapterIndex, adapters: Sequence[str] | None, *, safe: bool = False, progress: bool = False) -> None:
    """Merge adapters into the base weights of all layers; if one layer fails, none is changed.

    Args:
        index: the adapters of a model.
        adapters: the names of the adapters to merge. None: in each layer the adapters that are active in it; for a layer whose adapters were set
            individually, these may differ from the model's active adapters.
        safe: raise `MergeError` if a merged weight is not finite.
        progress: show a progress bar.

    Raises:
        AdapterNotFoundError, CapabilityError: raised before anything is changed.
        MergeError: a merged weight is not finite, or two adapters train the embeddings of the same tokens; nothing is changed then.
    """
    layers = [module for module in index.modules.values() if isinstance(module, AdapterLayer)]
    chosen = _acting_somewhere(index, layers) if adapters is None else tuple(adapters)
    index.require(*chosen)
    for adapter in chosen:
        index.require_capability(adapter, Capability.MERGE, "merged")
    already = [name for name in index.merged_adapters() if name in chosen]
    if already:
        warnings.warn(f"{listed(already)} are already merged, which is not repeated", PeftWarning, stacklevel=4)
    refuse_common_rows(index, (*index.merged_adapters(), *chosen), MergeError)
    if chosen:
        reshape.refuse_merge(index)
    names_in = {layer: chosen if adapters is not None else acting_in(index, layer) for layer in layers}
    for layer, names in names_in.items():
        refuse_wrong_order(layer, names, {inner: names_in.get(inner, ()) for inner in layers_inside(layer)})
    folded = _fold(names_in, safe, progress)
    if folded:
        index.selection.drop_cached()
        hooks.adapter_merged(index.base, tuple(name for name in dict.fromkeys(chosen) if name in folded))


def _fold(names_in: Mapping[AdapterLayer, Sequence[str]], safe: bool, progress: bool) -> set[str]:
    """Merge into each layer the adapters that `names_in` gives for it; undo all if one fails. Return the names of the adapters that were merged."""
    done: list[AdapterLayer] = []
    try:
        with collector_paused():
            for layer in _progress(list(names_in), "merging", progress):
                before = len(layer.merging.merges)
                layer.merge(safe, names_in[layer])
                if len(layer.merging.merges) > before:
                    done.append(layer)
    except BaseException:
        for layer in reversed(done):
            layer.merging.undo_last()
        raise
    return {name for layer in done for name in layer.merging.merges[-1].adapters}


def acting_in(index: AdapterIndex, module: AdapterModule) -> tuple[str, ...]:
    """Return the names of the adapters that are active in a module.

    These are the model's active adapters, or, if the adapters of this module were set individually, those set for the module. The result is empty
    if the module was disabled individually.
    """
    own = module.selection if isinstance(module, SelectionMixin) else index.selection
    return () if own is not index.selection and index.selection.enabled and not own.enabled else own.names


def _acting_somewhere(index: AdapterIndex, layers: Sequence[AdapterLayer]) -> tuple[str, ...]:
    """Return, in load order, the adapters that are active in the model or in a layer whose adapters were set individually."""
    found = {name for layer in layers if layer.selection is not index.selection for name in acting_in(index, layer) if name in layer.scaling}
    return tuple(name for name in index.configs if name in found or name in index.active)


def unmerge(index: AdapterIndex) -> None:
    """Unmerge all merged adapters; the layers are processed in reverse order."""
    merged = tuple(index.merged_adapters())
    with collector_paused():
        for module in reversed(list(index.modules.values())):
            if isinstance(module, AdapterLayer):
                module.unmerge()
    if merged:
        hooks.adapter_unmerged(index.base, merged)


def unload(
    index: AdapterIndex,
    *,
    fold: bool = False,
    adapters: Sequence[str] | None = None,
    safe: bool = False,
    progress: bool = False,
    restore_base: bool = True,
    announce: bool = False,
) -> nn.Module:
    """Remove all adapter layers, after merging if `fold`, and return the base.

    Args:
        index: the adapters of a model.
        fold: merge the adapters first. The copies of modules in `modules_to_save` that are in use replace the original modules.
        adapters: the adapters to merge; all others are removed, whether they are active or not. None: the active adapters.
        safe: raise `MergeError` if a merged weight is not finite.
        progress: show a progress bar.
        restore_base: for adapters that are not merged and that subtracted a matrix from base weights when they were created: True adds the matrix
            again; False leaves the base weights without it permanently.
        announce: warn once which of the two was done, if there are such adapters.

    Raises:
        as `merge`.
    """
    if not fold:
        unmerge(index)
    elif adapters is None:
        merge(index, None, safe=safe, progress=progress)
    else:
        index.require(*adapters)
        with _in_use_alone(index, adapters):  # adapters that will be removed must not count as active and unmerged
            merge(index, adapters, safe=safe, progress=progress)
    names, folded = tuple(index.configs), tuple(index.merged_adapters())
    replaced = {
        path: module.remains(acting_in(index, module) if not fold or adapters is None else tuple(adapters))
        for (_, path), module in index.modules.items()
        if isinstance(module, LeavesBehind)
    }
    changed = _settle(index, restore_base)
    for path in {path for kind, path in index.modules if kind and path}:
        for parent, leaf in index.view.sites.get(path, ()):
            setattr(parent, leaf, replaced.get(path, index.view.modules[path]))
    reshape.restore(index)
    remove_index(index)
    if fold or (changed and not restore_base):
        _untie(index.base)
    if changed and announce:
        _announce(changed, restore_base)
    hooks.adapter_unloaded(index.base, names, folded)
    return index.base


@contextmanager
def _in_use_alone(index: AdapterIndex, adapters: Sequence[str]) -> Iterator[None]:
    """Activate only these adapters, in all layers, individually set ones included. If the block raises, the previous selection is restored."""
    selections = [(module, module.selection) for module in index.modules.values() if isinstance(module, SelectionMixin)]
    before = index.selection.names
    try:
        for module, _ in selections:
            module.selection = index.selection
        index.selection.select([name for name in index.configs if name in adapters])
        yield
    except BaseException:
        for module, selection in selections:
            module.selection = selection
        index.selection.select(before)
        raise


def _settle(index: AdapterIndex, restore_base: bool) -> list[str]:
    """Make the base weights final, and return the unmerged adapters that subtracted a matrix from base weights at their creation.

    With `restore_base`, these matrices are added again first.
    """
    layers = [module for module in index.modules.values() if isinstance(module, AdapterLayer)]
    changed: dict[str, None] = {}
    for layer in layers:
        for adapter in layer.merging.unmerged_shifts():
            changed[adapter] = None
            if restore_base:
                layer.merging.restore(adapter)
    for layer in layers:
        layer.merging.settle()
    return list(changed)


def _announce(adapters: Sequence[str], restored: bool) -> None:
    subtracted = f"the initialisation of {listed(adapters)} subtracted a matrix from base weights, which"
    message = (
        f"{subtracted} was added again: the base has its original weights; with restore_base=False it stays subtracted"
        if restored
        else f"{subtracted} stays subtracted: load the adapter's weights onto this base without that initialisation; restore_base=True adds it again"
    )
    warnings.warn(message, PeftWarning, stacklevel=5)


def _untie(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to False in the config if merging made input and output embeddings differ; else reloading would lose one of them."""
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
