"""What `base_model` shows for tuners that wrap layers: the base under `.model`, with the operations on its adapters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..calls.routing import check_route
from ..config import PeftConfig
from ..errors import AdapterNameError, AdapterNotFoundError, ModelError, PeftWarning
from ..layers.adapter_layer import AdapterLayer
from ..layers.init_options import InitOptions
from ..operations import merge as folding
from ..operations.activate import activate, follow_model, set_trainable
from ..operations.add import add_adapter
from ..operations.delete import delete
from ..tuners.index import ATTRIBUTE, AdapterIndex
from .chosen_modules import chosen_by


class AdapterOperations:
    """Operations on the adapters of a model, for every class that has an index."""

    _peft_index: AdapterIndex

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter, or several whose effects add up, from now on. They train; all others are frozen.

        Args:
            adapter_name: a name or a list of names. Adapters act in the order in which they were added, not in list order.
            inference_mode: they do not train either.

        Raises:
            AdapterNotFoundError: the model lacks one; nothing changes then.
        """
        activate(self._peft_index, _names(adapter_name), trainable=not inference_mode)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights, all or nothing; `unmerge_adapter` takes them out again bit for bit.

        Args:
            adapter_names: which; None: those in use.
            safe_merge: refuse results that are not finite.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is as before.
        """
        folding.merge(self._peft_index, None if adapter_names is None else _names(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights, which have every bit that they had before."""
        if not self._peft_index.merged_adapters():
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
            return
        folding.unmerge(self._peft_index)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
        """Fold adapters in, take all wrappers off, and return the base: the same object as was given. This model is used up.

        Args:
            progressbar: show a progress bar.
            safe_merge: refuse results that are not finite.
            adapter_names: which; None: those in use.

        Raises:
            AdapterNotFoundError, CapabilityError, MergeError: the model is as before.
        """
        names = None if adapter_names is None else _names(adapter_names)
        return folding.unload(self._peft_index, fold=True, adapters=names, safe=safe_merge, progress=progressbar)

    def unload(self) -> nn.Module:
        """Take all wrappers off without merging and return the base. A saved head in use stays. This model is used up."""
        return folding.unload(self._peft_index)

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
            folding.unmerge(self._peft_index)
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
            *adapter_names: none of them: the plain base.

        Raises:
            AdapterNotFoundError, RoutingError: the model lacks one, or some are merged.
        """
        from ..selection.route import Route

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
        """The adapters in use, in load order."""
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


class TunerModel(nn.Module, AdapterOperations):
    """The base model as `model`, plus the operations on its adapters. Parameter names go through it: `base_model.model.…`.

    Args:
        index: the adapters of the base.
    """

    def __init__(self, index: AdapterIndex) -> None:
        super().__init__()
        self.model = index.base
        self.__dict__[ATTRIBUTE] = index

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter → config."""
        return self._peft_index.configs

    @property
    def prefix(self) -> str:
        """What the parameter names of the first adapter's method begin with.

        Raises:
            AdapterNotFoundError: there is no adapter.
        """
        index = self._peft_index
        if not index.configs:
            raise AdapterNotFoundError("the model has no adapter")
        return index.spec(next(iter(index.configs))).parameter_prefix

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the adapter whose config was put into `peft_config` under its name; it is neither in use nor trainable yet.

        Args:
            model: the base: the one that this stands for.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: half-precision weights are kept in float32.
            low_cpu_mem_usage: weights on the meta device, to be loaded later.
            state_dict: the names in it decide which modules are adapted, instead of the config.

        Raises:
            AdapterNotFoundError: `peft_config` has no such config.
            AdapterNameError: it is added already.
            ModelError: `model` is another.
            others: as `inject_adapter_in_model`; the model and `peft_config` are as before.
        """

        index = self._peft_index
        index.require(adapter_name)
        if model is not index.base:
            raise ModelError(f"this {type(self).__name__} stands for another {type(index.base).__name__}", hint="give its `.model`")
        if adapter_name in index.keys_by_adapter:
            raise AdapterNameError(f"the adapter {adapter_name!r} already exists", hint="delete_adapter it first, or take another name")
        config = index.configs.pop(adapter_name)
        try:
            view = None if state_dict is None else chosen_by(index, config, adapter_name, state_dict)
            add_adapter(
                index,
                adapter_name,
                config,
                init_options=InitOptions(meta=low_cpu_mem_usage, autocast=autocast_adapter_dtype),
                view=view,
                mount_on=self,
            )
        except BaseException:
            index.configs[adapter_name] = config
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with `args` and `kwargs`."""
        return self.model(*args, **kwargs)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return the config of `model`, the base, as a dict; ``{"model_type": "custom"}`` without one."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        found: dict[str, Any] = dict(config) if isinstance(config, dict) else config.to_dict()
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            operation = self._operation(name)
            return getattr(self.model, name) if operation is None else operation


def _parameters_in(module: object) -> tuple[str, ...]:
    return module.targeted_parameters if isinstance(module, AdapterLayer) else ()


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise AdapterNotFoundError(f"Adapter {given!r} not found", hint="give a name or a list of names")
    return tuple(given)
