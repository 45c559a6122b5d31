"""Wrapper for modules of the base model of which each adapter trains a full copy (`modules_to_save`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..base.weight import without_offloading
from ..errors import RoutingError
from ..selection.route import ALL
from ..selection.selection import AdapterSelection
from ..selection.switching import AuxiliaryTrainingWrapper
from ..tensor_names import join
from .adapter_layer import AdapterLayer
from .init_options import InitOptions
from .slots import Slot, module_slots, write_tensor


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A wrapper around a module of the base model, with a full trainable copy of the module for each adapter.

    For each row of the batch, the copy of the last of its active adapters that has a copy is used; if none has a copy, the original module.

    In all methods, `adapter` (or `adapter_name`) is the name of an adapter; `x`, `args` and `kwargs` are the arguments of the module.

    Args:
        original: the module of the base model.
        selection: the active adapters.

    Attributes:
        original_module: the module of the base model.
        modules_to_save: adapter → the adapter's copy of the module.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original: nn.Module, selection: AdapterSelection) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.selection = selection
        #: adapter → the wrapper with whose copy this wrapper's copy shares its weight (tied weights)
        self.tied: dict[str, ModulesToSaveWrapper] = {}

    def attach(self, adapter: str, init_options: InitOptions, tied_to: ModulesToSaveWrapper | None = None) -> None:
        """Add a frozen copy for `adapter`, in the dtype of the original; on the meta device if `init_options.meta` is set.

        If `tied_to` is given, the new copy shares the weight of the adapter's copy in that wrapper.
        """
        duplicate = _copy_without_wrappers(self.original_module)
        self.modules_to_save[adapter] = (duplicate.to("meta") if init_options.meta else duplicate).requires_grad_(False)
        if tied_to is not None:
            self.tied[adapter] = tied_to
            self._tie(adapter)

    def _tie(self, adapter: str) -> None:
        shared = self.tied[adapter].modules_to_save[adapter]._parameters["weight"]
        self.modules_to_save[adapter].register_parameter("weight", shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the active adapter's copy for the module's arguments; rows with different adapters are computed separately.

        Raises:
            RoutingError: rows have different adapters, and the arguments contain no tensor, or they contain a cache, to which each copy would write.
        """
        route = self.selection.current()
        copies = self.modules_to_save._modules
        if route.per_row is None:
            acting = next((adapter for adapter in reversed(route.names) if adapter in copies), None)
            module: Any = self.original_module if acting is None else copies[acting]
            return module(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        x = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
        if x is None or any(hasattr(leaf, "get_seq_length") for leaf in leaves):
            what = f"a saved {type(self.original_module).__name__}"
            raise RoutingError(
                f"rows are under different adapters, and {what} was called {'without tensors' if x is None else 'with a cache'}",
                hint="use one adapter for the batch, or use_cache=False",
            )
        batch = x.shape[0]
        output = self.original_module(*args, **kwargs)
        for adapter in route.used:
            rows = route.rows(adapter, batch, x.device) if adapter in copies else None
            copied: Any = copies.get(adapter)
            if rows is ALL:
                output = copied(*args, **kwargs)
            elif isinstance(rows, Tensor):
                row_args, row_kwargs = tree_map(partial(_select_rows, rows, batch), (args, kwargs))
                output = tree_map(partial(_replace_rows, rows, batch), output, copied(*row_args, **row_kwargs))
        return output

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have a copy of the module."""
        return tuple(self.modules_to_save)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the parameters of the adapter's copy."""
        return dict(self.modules_to_save[adapter].named_parameters())

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return slots for all parameters and persistent buffers of the adapter's copy, by their names in the original module."""
        found = module_slots(self.modules_to_save[adapter])
        if adapter in self.tied:
            source = self.tied[adapter].modules_to_save[adapter]

            def write(value: Tensor) -> None:
                write_tensor(source, "weight", value)
                self._tie(adapter)  # `write_tensor` may have replaced the parameter: share the new one

            found["weight"] = dataclasses.replace(found["weight"], write=write)
        return found

    def drop(self, adapter: str) -> None:
        """Remove the adapter's copy of the module."""
        self.tied.pop(adapter, None)
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def remains(self, adapters: Sequence[str]) -> nn.Module:
        """Return the module that replaces the unloaded wrapper: the copy of the last of `adapters` that has a copy, else the original module."""
        for adapter in reversed(adapters):
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return {key in an adapter's file: key in memory}, both relative to this module's path."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: join("modules_to_save", adapter_name, key) for key in module_slots(self.modules_to_save[adapter_name])}

    @property
    def active_copy(self) -> nn.Module:
        """The module that `forward` uses at present if all rows have the same adapters."""
        for adapter in reversed(self.selection.current().names):
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "selection", "tied") or name.startswith("__"):
                raise
            return getattr(self.active_copy, name)


def _copy_without_wrappers(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` without the adapter wrappers around it and inside it."""

    def bare(part: nn.Module) -> nn.Module:
        while isinstance(part, (AdapterLayer, ModulesToSaveWrapper)):
            part = part.get_base_layer() if isinstance(part, AdapterLayer) else part.original_module
        return part

    # wrappers refer to the model's adapter selection, which must not be copied: remove the wrappers before the copy
    wrapped = [(parent, name, child) for parent in bare(module).modules() for name, child in parent.named_children() if bare(child) is not child]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = bare(child)
        unwrapped = bare(module)
        with without_offloading(unwrapped):  # the copy is trainable, so it must not be offloaded
            return copy.deepcopy(unwrapped)
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _select_rows(rows: Tensor, batch: int, value: Any) -> Any:
    """Return `value[rows]` if `value` is a tensor of shape (batch, …); return any other value unchanged."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value


def _replace_rows(rows: Tensor, batch: int, whole: Any, part: Any) -> Any:
    """Return `whole`, if it is a tensor of shape (batch, …), with `rows` replaced by the rows of `part`; return any other value unchanged."""
    if not (isinstance(whole, Tensor) and whole.dim() and whole.shape[0] == batch):
        return whole
    return whole.index_copy(0, rows.to(whole.device), part.to(whole.dtype))
