"""The operations on a model's adapters, as methods: what `PeftModel`, `PeftMixedModel` and `TunerModel` share."""

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
    """Operations on the adapters of a model, for every class that has an index."""

    _peft_index: AdapterIndex
    #: what `restore_base` is where a call of `unload` or `merge_and_unload` does not say
    restores_base: bool = True

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter, or several whose effects add up, from now on. They train; all others are frozen.

        Args:
            adapter_name: a name or a list of names. In each layer the adapters of one method act in this order; where several methods wrap one
                layer, the one that was added first is innermost.
            inference_mode: they do not train either.

        Raises:
            AdapterNotFoundError: the model lacks one; nothing changes then.
        """
        activate(self._peft_index, _names(adapter_name), trainable=not inference_mode)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights, all or nothing; `unmerge_adapter` takes them out again bit for bit.

        Args:
            adapter_names: which; None: those in use, in layers that were switched individually those in use there.
            safe_merge: refuse results that are not finite.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is as before.
        """
        merging.merge(self._peft_index, None if adapter_names is None else _names(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights, which have every bit that they had before."""
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
        """Fold adapters in, take all wrappers off, and return the base: the same object as was given. This model is used up.

        Args:
            progressbar: show a progress bar.
            safe_merge: refuse results that are not finite.
            adapter_names: which; all others are dropped. None: those in use.
            restore_base: what becomes of weights that adapters which are dropped took a part out of; as `unload`.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is as before.
        """
        names = None if adapter_names is None else _names(adapter_names)
        return self._unload(restore_base, fold=True, adapters=names, safe=safe_merge, progress=progressbar)

    def unload(self, *, restore_base: bool | None = None) -> nn.Module:
        """Take all wrappers off without merging and return the base. A saved head in use stays. This model is used up.

        Args:
            restore_base: what becomes of weights out of which adapters took a part when they were created (with LoRA: PiSSA, OLoRA, CorDA, LoRA-GA,
                LoftQ, KaSA). True gives it back, so that the base has its original weights, bit for bit. False leaves it out: W − s·B₀·A₀ is the
                base for the adapter's weights as they are, without its initialisation. None: as the attribute `restores_base` says, with a warning.
        """
        return self._unload(restore_base)

    def _unload(self, restore_base: bool | None, **how: Any) -> nn.Module:
        restored = self.restores_base if restore_base is None else restore_base
        merging.unload(self._peft_index, restore_base=restored, announce=restore_base is None, **how)
        return self._given()

    def _given(self) -> nn.Module:
        """Return the model that was wrapped, with what others had put around it."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only one in use, the first that remains takes over, with a warning.

        Args:
            adapter_name: which adapter.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            MergeError: it is merged.
        """
        if not isinstance(adapter_name, str):
            raise AdapterNotFoundError(f"Adapter {adapter_name!r} not found", hint="give one name")
        delete(self._peft_index, adapter_name)

    def enable_adapter_layers(self) -> None:
        """Switch the chosen adapters on again."""
        follow_model(self._peft_index)
        self._peft_index.selection.enable(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        follow_model(self._peft_index)
        if self._peft_index.merged_adapters():
            merging.unmerge(self._peft_index)
        self._peft_index.selection.enable(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, whether they are in use or not.

        Args:
            adapter_names: a name or names.
            requires_grad: whether they train.

        Raises:
            AdapterNotFoundError: the model lacks one.
        """
        names = _names(adapter_names)
        self._peft_index.require(*names)
        for name in names:
            set_trainable(self._peft_index, name, requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether a low-rank product can stand for what an adapter does in each of its layers.

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
        """Use these adapters until the block ends, whatever other threads and tasks of an event loop do; which parameters train does not change.

        Where an event loop runs, the choice is that of the task: call this model then, not the one inside it.

        Args:
            *adapter_names: none of them: the plain base. They act in load order, as those of rows do.

        Raises:
            AdapterNotFoundError, RoutingError: the model lacks one, or some are merged.
        """
        index = self._peft_index
        index.require(*adapter_names)
        route = Route(tuple(name for name in index.configs if name in adapter_names))
        check_route(index, route)
        with index.selection.use_in_context(route):
            yield

    def _operation(self, name: str) -> Callable[..., Any] | None:
        """Return what a tuner offers for this model as `name` (`TunerBase.operations`); None if there is no such thing."""
        index: AdapterIndex | None = self.__dict__.get(ATTRIBUTE)  # copies and pickles have none yet
        found = index.operation(name) if index is not None else None
        return None if found is None else functools.partial(found, self)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use, in the order given."""
        return list(self._peft_index.active)

    @property
    def active_adapter(self) -> str | list[str] | None:
        """The adapter in use; a list if there are several, None if there is none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else (active or None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is in use and not disabled."""
        return bool(self._peft_index.active) and self._peft_index.selection.enabled

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules of the base that adapters wrap."""
        entries = self._peft_index.modules.items()
        return list(dict.fromkeys(path for (kind, path), module in entries if kind and not kind.startswith("@") and not _parameters_in(module)))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters of the base that adapters change by themselves, without wrapping their module as a whole."""
        return [f"{path}.{name}" for (_, path), module in self._peft_index.modules.items() for name in _parameters_in(module)]


def _parameters_in(module: object) -> tuple[str, ...]:
    return module.targeted_parameters if isinstance(module, AdapterLayer) else ()


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise AdapterNotFoundError(f"Adapter {given!r} not found", hint="give a name or a list of names")
    return tuple(given)


def given_to(model: nn.Module) -> nn.Module:
    """Return the model that was wrapped, where `model` is one of ours or a wrapper of others around one; `model` itself elsewhere."""
    inner = adapted_model(model)
    return inner._given() if isinstance(inner, AdapterOperations) else model
