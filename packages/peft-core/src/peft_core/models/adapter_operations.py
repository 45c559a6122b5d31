"""The operations on a model's adapters, as methods that `PeftModel`, `PeftMixedModel` and `TunerModel` share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..calls.routing import check_route
from ..errors import AdapterNotFoundError, PeftWarning
from ..layers.adapter_layer import AdapterLayer
from ..operations import merge as merging
from ..operations.activate import activate, follow_model, set_trainable
from ..operations.delete import delete
from ..selection.route import Route
from ..tuners.index import ATTRIBUTE, AdapterIndex, adapted_model


class AdapterOperations:
    """The methods that operate on the adapters of a model; a mixin for classes with an `AdapterIndex` in `_peft_index`."""

    _peft_index: AdapterIndex
    #: the value of `restore_base` if a call of `unload` or `merge_and_unload` does not pass it
    restores_base: bool = True

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several whose effects add up. Their parameters become trainable; all other adapters are frozen.

        Args:
            adapter_name: a name or a list of names. In each layer the adapters of one method act in this order. If several methods wrap one
                layer, the wrapper of the method that was added first is innermost.
            inference_mode: True: the activated adapters are frozen, too.

        Raises:
            AdapterNotFoundError: the model has no adapter of one of these names; nothing changes then.
        """
        activate(self._peft_index, _names(adapter_name), trainable=not inference_mode)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights: all of them, or none if one fails. `unmerge_adapter` restores the weights bit for bit.

        Args:
            adapter_names: the adapters to merge. None: the active adapters; in a layer whose adapters were set individually, the ones active there.
            safe_merge: raise `MergeError` if a merged weight is not finite.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is unchanged.
        """
        merging.merge(self._peft_index, None if adapter_names is None else _names(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerge all merged adapters; the base weights are restored bit for bit. Warns if no adapter is merged."""
        if not self._peft_index.merged_adapters():
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
            return
        merging.unmerge(self._peft_index)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        *,
        restore_base: bool | None = None,
    ) -> nn.Module:
        """Merge adapters, remove all adapter layers, and return the base: the object that was wrapped. Do not use this model afterwards.

        Args:
            progressbar: show a progress bar.
            safe_merge: raise `MergeError` if a merged weight is not finite.
            adapter_names: the adapters to merge; all other adapters are removed. None: the active adapters.
            restore_base: as in `unload`, for the adapters that are removed without being merged.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is unchanged.
        """
        names = None if adapter_names is None else _names(adapter_names)
        return self._unload(restore_base, fold=True, adapters=names, safe=safe_merge, progress=progressbar)

    def unload(self, *, restore_base: bool | None = None) -> nn.Module:
        """Remove all adapter layers without merging and return the base. A saved head that is in use stays in it. Do not use this model afterwards.

        Args:
            restore_base: for adapters that subtracted a matrix from base weights when they were created (with LoRA: PiSSA, OLoRA, CorDA, LoRA-GA,
                LoftQ, KaSA). True adds the matrix again, so that the base has its original weights, bit for bit. False leaves the weights
                W − s·B₀·A₀: the base for the adapter's current weights, if they are loaded without its initialisation. None: the attribute
                `restores_base` decides, with a warning.
        """
        return self._unload(restore_base)

    def _unload(self, restore_base: bool | None, **how: Any) -> nn.Module:
        restored = self.restores_base if restore_base is None else restore_base
        merging.unload(self._peft_index, restore_base=restored, announce=restore_base is None, **how)
        return self._wrapped_base()

    def _wrapped_base(self) -> nn.Module:
        """Return the model that was wrapped, including the wrappers of other libraries that it already had."""
        raise NotImplementedError(f"{type(self).__name__} must define _wrapped_base()")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first remaining adapter is activated, with a warning.

        Args:
            adapter_name: the adapter to delete.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            MergeError: the adapter is merged.
        """
        if not isinstance(adapter_name, str):
            raise AdapterNotFoundError(f"Adapter {adapter_name!r} not found", hint="give one name")
        delete(self._peft_index, adapter_name)

    def enable_adapter_layers(self) -> None:
        """Enable the active adapters again, after `disable_adapter_layers`."""
        follow_model(self._peft_index)
        self._peft_index.selection.enable(True)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters until `enable_adapter_layers` is called. Merged adapters are unmerged."""
        follow_model(self._peft_index)
        if self._peft_index.merged_adapters():
            merging.unmerge(self._peft_index)
        self._peft_index.selection.enable(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of the parameters of adapters, whether these adapters are active or not.

        Args:
            adapter_names: a name or a list of names.
            requires_grad: whether the parameters are trainable.

        Raises:
            AdapterNotFoundError: the model has no adapter of one of these names; nothing changes then.
        """
        names = _names(adapter_names)
        self._peft_index.require(*names)
        for name in names:
            set_trainable(self._peft_index, name, requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter can be converted to LoRA: in each of its layers, a low-rank product can replace it.

        Args:
            adapter_name: which adapter.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
        """
        self._peft_index.require(adapter_name)
        layers = [module for (kind, _), module in self._peft_index.modules_of(adapter_name) if kind and not kind.startswith("@")]
        return bool(layers) and all(isinstance(layer, AdapterLayer) and layer.supports_lora_conversion(adapter_name) for layer in layers)

    @contextmanager
    def use_adapters(self, *adapter_names: str) -> Iterator[None]:
        """Use these adapters inside the block, independently of other threads and of other tasks of an event loop. `requires_grad` does not change.

        In an event loop the selection belongs to the current task: call this model then, not its base model.

        Args:
            *adapter_names: the adapters to use, in load order (as with `adapter_names` of `forward`); without any: the base without adapters.

        Raises:
            AdapterNotFoundError, RoutingError: the model has no adapter of one of these names, or adapters are merged.
        """
        index = self._peft_index
        index.require(*adapter_names)
        route = Route(tuple(name for name in index.configs if name in adapter_names))
        check_route(index, route)
        with index.selection.use_in_context(route):
            yield

    def _operation(self, name: str) -> Callable[..., Any] | None:
        """Return the operation `name` that a tuner adds to this model (`TunerBase.operations`), bound to the model; None if there is none."""
        index: AdapterIndex | None = self.__dict__.get(ATTRIBUTE)  # while a model is copied or unpickled, the index is not set yet
        found = index.operation(name) if index is not None else None
        return None if found is None else functools.partial(found, self)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in the order in which they were passed to `set_adapter`."""
        return list(self._peft_index.active)

    @property
    def active_adapter(self) -> str | list[str] | None:
        """The name of the active adapter; a list of names if there are several, None if there is none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else (active or None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and the adapters are not disabled."""
        return bool(self._peft_index.active) and self._peft_index.selection.enabled

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the base's modules that adapters wrap."""
        entries = self._peft_index.modules.items()
        return list(dict.fromkeys(path for (kind, path), module in entries if kind and not kind.startswith("@") and not _parameters_in(module)))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the base's parameters that adapters change individually (`target_parameters`), without wrapping the whole module."""
        return [f"{path}.{name}" for (_, path), module in self._peft_index.modules.items() for name in _parameters_in(module)]


def _parameters_in(module: object) -> tuple[str, ...]:
    return module.targeted_parameters if isinstance(module, AdapterLayer) else ()


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise AdapterNotFoundError(f"Adapter {given!r} not found", hint="give a name or a list of names")
    return tuple(given)


def callable_base(model: nn.Module) -> nn.Module:
    """Return the model that was wrapped, if `model` is an adapted model, also inside another library's wrapper; otherwise return `model`."""
    inner = adapted_model(model)
    return inner._wrapped_base() if isinstance(inner, AdapterOperations) else model
