"""Modules of the base with a trainable whole copy per adapter."""

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
    """A module of the base with a trainable whole copy per adapter.

    A row sees the copy of the last of its adapters that has one, otherwise the original.

    Methods take an adapter's name as `adapter` (or `adapter_name`), and what the module takes as `x`, `args` and `kwargs`.

    Args:
        original: the module of the base.
        selection: which adapters act.

    Attributes:
        original_module: the module of the base.
        modules_to_save: adapter → its copy.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original: nn.Module, selection: AdapterSelection) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.selection = selection
        #: adapter → the wrapper of the module with whose copy this one's copy shares its weight
        self.tied: dict[str, ModulesToSaveWrapper] = {}

    def attach(self, adapter: str, init_options: InitOptions, tied_to: ModulesToSaveWrapper | None = None) -> None:
        """Add a copy for `adapter` as `init_options` says, in the dtype of the original; its weight may be that of the copy in `tied_to`."""
        duplicate = _copy_without_wrappers(self.original_module)
        self.modules_to_save[adapter] = (duplicate.to("meta") if init_options.meta else duplicate).requires_grad_(False)
        if tied_to is not None:
            self.tied[adapter] = tied_to
            self._tie(adapter)

    def _tie(self, adapter: str) -> None:
        shared = self.tied[adapter].modules_to_save[adapter]._parameters["weight"]
        self.modules_to_save[adapter].register_parameter("weight", shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the copy of the adapter in use makes of the arguments, which are those of the module; row by row where rows differ.

        Raises:
            RoutingError: rows differ, and the module writes to a cache, which each copy would do.
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
        """Return the adapters that have a copy."""
        return tuple(self.modules_to_save)

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the parameters of the adapter's copy."""
        return dict(self.modules_to_save[adapter].named_parameters())

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return all parameters and buffers of the copy, under the original's names."""
        found = module_slots(self.modules_to_save[adapter])
        if adapter in self.tied:
            source = self.tied[adapter].modules_to_save[adapter]

            def write(value: Tensor) -> None:
                write_tensor(source, "weight", value)
                self._tie(adapter)  # the parameter may be a new one

            found["weight"] = dataclasses.replace(found["weight"], write=write)
        return found

    def drop(self, adapter: str) -> None:
        """Remove the copy."""
        self.tied.pop(adapter, None)
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def remains(self, adapters: Sequence[str]) -> nn.Module:
        """Return what replaces the wrapper when it is unloaded and `adapters` stay in effect: the copy of the last of them, else the original."""
        for adapter in reversed(adapters):
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return key in an adapter's file → key in memory, both behind the path of this module."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: join("modules_to_save", adapter_name, key) for key in module_slots(self.modules_to_save[adapter_name])}

    @property
    def active_copy(self) -> nn.Module:
        """The module that a plain forward would use now."""
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
    """Return a deep copy without the wrappers of other adapters."""

    def bare(part: nn.Module) -> nn.Module:
        while isinstance(part, (AdapterLayer, ModulesToSaveWrapper)):
            part = part.get_base_layer() if isinstance(part, AdapterLayer) else part.original_module
        return part

    # wrappers refer to the model's selection, which must not be copied: take them off first
    wrapped = [(parent, name, child) for parent in bare(module).modules() for name, child in parent.named_children() if bare(child) is not child]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = bare(child)
        unwrapped = bare(module)
        with without_offloading(unwrapped):  # the copy trains: it stays in memory
            return copy.deepcopy(unwrapped)
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _select_rows(rows: Tensor, batch: int, value: Any) -> Any:
    """Return some rows of a tensor (batch, …); anything else as it is."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value


def _replace_rows(rows: Tensor, batch: int, whole: Any, part: Any) -> Any:
    """Return a tensor (batch, …) with some rows replaced by those of `part`; anything else as it is."""
    if not (isinstance(whole, Tensor) and whole.dim() and whole.shape[0] == batch):
        return whole
    return whole.index_copy(0, rows.to(whole.device), part.to(whole.dtype))
