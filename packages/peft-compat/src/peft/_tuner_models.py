"""The classes of `base_model` with upstream's interface: one class per PEFT method, with the methods that other code calls, overrides or replaces."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

import peft_core
from peft_core import BaseView, InitOptions, LayerTuner, MethodModel, PeftConfig, PeftWarning, TunerBase
from peft_core.errors import CapabilityError, ConfigError, MergeError, PeftError, listed
from peft_core.models.adapter_operations import AdapterOperations
from peft_core.models.tuner_model import TunerModel
from peft_core.tuners import targeting
from peft_core.tuners.index import AdapterIndex
from peft_core.tuners.review import InjectionReview

from ._layers import LoraLayer
from ._mappings import PEFT_TYPE_TO_TUNER_MAPPING
from ._sub_modules import check_target_module_exists

_HALF = ("float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
#: methods that upstream's injection calls and our injection does not; replacing one of them only causes a warning
NOT_CALLED = (
    *("_create_new_module", "_replace_module", "_mark_only_adapters_as_trainable", "_inject_parameters", "_prepare_adapter_config"),
    *("_prepare_model", "_check_new_adapter_config"),
)


class BaseTuner(MethodModel):
    """The base with adapters of one PEFT method. See `peft_core.MethodModel`.

    The class has the methods that upstream's injection calls, because other code replaces or overrides them. `_create_and_replace` and
    `_check_target_module_exists` decide which modules are wrapped, `_cast_adapter_dtype` casts new weights, and `_unload_and_optionally_merge`
    removes the adapter layers. Our injection does not call the methods in `NOT_CALLED`, and warns if one of them was replaced.
    """

    peft_type: ClassVar[str | None] = None
    tuner_layer_cls: ClassVar[Any] = peft_core.BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def _review(self, index: AdapterIndex) -> InjectionReview:
        TunerModel.__init__(self, index)
        return Seams(self)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name → config; while an adapter is being added, this includes its config."""
        pending: dict[str, PeftConfig] | None = self.__dict__.get("_pending")
        return self._peft_index.configs if pending is None else {**self._peft_index.configs, **pending}

    # ---- called by our injection if other code has replaced them ----------------------------------------------------
    def _create_and_replace(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str, **optional_kwargs: Any
    ) -> None:
        """Choose `target`, the child `target_name` of `parent`, to be wrapped; injection calls this method for each target module."""
        chosen: list[nn.Module] | None = self.__dict__.get("_chosen")
        if chosen is None:
            raise CapabilityError("_create_and_replace is called by injection", hint="call inject_adapter, or peft.inject_adapter_in_model")
        chosen.append(target)

    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> Any:
        """Return whether the module with the name `key` is a target of `config`."""
        return check_target_module_exists(config, key)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter's 16-bit and 8-bit floating-point weights to float32 in place, if `autocast_adapter_dtype`."""
        for parameter in self._peft_index.parameters_of(adapter_name) if autocast_adapter_dtype else ():
            if str(parameter.dtype).removeprefix("torch.") in _HALF:
                parameter.data = parameter.data.to(torch.float32)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        **restoring: bool | None,
    ) -> nn.Module:
        """Remove all adapter layers and return the base; merge adapters first if `merge`. `restoring` may contain `restore_base`."""
        if not merge:
            return super().unload(**restoring)
        self._refuse_to_merge(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names, **restoring)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        *,
        restore_base: bool | None = None,
    ) -> nn.Module:
        """The same as `peft_core.TunerModel.merge_and_unload`, but calls `_unload_and_optionally_merge`, which other code may have replaced."""
        restoring = {} if restore_base is None else {"restore_base": restore_base}  # a replaced method may not have this parameter
        return self._unload_and_optionally_merge(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, **restoring)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters as `peft_core.TunerModel.merge_adapter` does.

        Args:
            adapter_names, safe_merge: the same as in `peft_core.TunerModel.merge_adapter`.

        Raises:
            MergeError: an adapter has weights in a user-defined layer, which can't be merged.
            others: the same as in `peft_core.TunerModel.merge_adapter`.
        """
        self._refuse_to_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _refuse_to_merge(self, adapter_names: str | Sequence[str] | None) -> None:
        given = self.active_adapters if adapter_names is None else [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for (_, path), module in self._peft_index.modules.items():
            if isinstance(module, LoraLayer) and not isinstance(module, LoraLayer.of_ours) and set(module.adapters()) & set(given):
                raise MergeError(f"{path!r} is a {type(module).__name__}, a layer of one's own, which is not merged", hint="use it unmerged")

    def unload(self, *, restore_base: bool | None = None) -> nn.Module:
        """The same as `peft_core.TunerModel.unload`, but calls `_unload_and_optionally_merge`, which other code may have replaced."""
        restoring: dict[str, Any] = {} if restore_base is None else {"restore_base": restore_base}
        return self._unload_and_optionally_merge(merge=False, **restoring)

    # ---- not called -------------------------------------------------------------------------------------------------
    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        raise _not_called("_create_new_module")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        raise _not_called("_replace_module")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Do nothing: injection freezes the base, and `set_adapter` makes adapters trainable."""

    def _inject_parameters(self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> list[str]:
        raise _not_called("_inject_parameters")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Do nothing: our injection needs no preparation of the model."""

    def _check_new_adapter_config(self, config: Any) -> None:
        config.check()


def _not_called(name: str) -> CapabilityError:
    return CapabilityError(
        f"{name}: our injection makes and places layers by itself", hint="offer layers of your own with the hook peft_make_layer (docs/plugins.md)"
    )


#: method name → the original method of `BaseTuner`, to find out whether other code has replaced it
_SEAMS = {name: BaseTuner.__dict__[name] for name in ("_create_and_replace", "_check_target_module_exists", "_cast_adapter_dtype", *NOT_CALLED)}


def replaced(kind: type, name: str) -> bool:
    """Return whether the method `name` of `BaseTuner` was replaced or overridden in the class `kind` or one of its base classes."""
    return inspect.getattr_static(kind, name) is not _SEAMS[name]


class Seams(InjectionReview):
    """Calls the methods that other code has replaced in the class of a tuner model, when an adapter is added.

    Args:
        tuner: the tuner model, an object of the class in which methods may have been replaced.
    """

    def __init__(self, tuner: BaseTuner) -> None:
        self.tuner = tuner

    def options(self, options: InitOptions) -> InitOptions:
        """Return `options`, with autocast switched off if `_cast_adapter_dtype` was replaced; warn if methods in `NOT_CALLED` were replaced."""
        kind = type(self.tuner)
        ignored = [name for name in NOT_CALLED if replaced(kind, name)]
        if ignored:
            warnings.warn(
                f"{listed(ignored)} of {kind.__name__} were replaced and are not called: our injection works in another way; "
                "for layers of your own there is the hook peft_make_layer",
                PeftWarning,
                stacklevel=6,
            )
        return replace(options, autocast=False) if options.autocast and replaced(kind, "_cast_adapter_dtype") else options

    def view(self, adapter: str, config: Any, tuner: TunerBase, view: BaseView) -> BaseView:
        """Return a view whose targets are the modules that `_check_target_module_exists` and `_create_and_replace` choose, if they were replaced."""
        kind = type(self.tuner)
        checks, creates = (replaced(kind, name) for name in ("_check_target_module_exists", "_create_and_replace"))
        if not (checks or creates) or not isinstance(tuner, LayerTuner) or not (config.target_modules or tuner.adapts_modules(config)):
            return view
        with self._pending(adapter, config):
            if checks and view.chosen is None:
                names = [name for name in view.modules if name and self.tuner._check_target_module_exists(config, name)]
            else:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        names = list(targeting.select(view, config, tuner.default_targets(view)).names)
                except PeftError:  # planning the injection will raise the same error
                    return view
            chosen = self._created(adapter, config, view, names) if creates else names
        if not checks and set(chosen) == set(names):
            return view
        if getattr(config, "target_parameters", None):
            raise ConfigError(
                f"{kind.__name__} was made to choose other modules than target_modules says, which does not work beside target_parameters",
                hint="name the modules in the config",
            )
        return view.choosing(chosen)

    def filled(self, adapter: str, config: Any, options: InitOptions) -> None:
        """Call `_cast_adapter_dtype` for the weights of `adapter`, if the method was replaced."""
        if replaced(type(self.tuner), "_cast_adapter_dtype"):
            with self._pending(adapter, config):
                self.tuner._cast_adapter_dtype(adapter_name=adapter, autocast_adapter_dtype=options.autocast)

    def _created(self, adapter: str, config: Any, view: BaseView, names: Sequence[str]) -> list[str]:
        paths = {id(module): path for path, module in reversed(view.modules.items())}
        chosen: list[nn.Module] = []
        self.tuner.__dict__["_chosen"] = chosen
        try:
            for path in names:
                parent, _, leaf = path.rpartition(".")
                self.tuner._create_and_replace(config, adapter, view.modules[path], leaf, view.modules[parent], current_key=path)
        finally:
            self.tuner.__dict__.pop("_chosen", None)
        strangers = [type(module).__name__ for module in chosen if id(module) not in paths]
        if strangers:
            raise ConfigError(f"_create_and_replace chose {listed(strangers)}, no module of {view.name}", hint="choose modules of the base")
        return [paths[id(module)] for module in chosen]

    @contextmanager
    def _pending(self, adapter: str, config: Any) -> Iterator[None]:
        self.tuner.__dict__["_pending"] = {adapter: config}
        try:
            yield
        finally:
            self.tuner.__dict__.pop("_pending", None)


class LoraModel(BaseTuner):
    """A base with LoRA adapters; see `peft_core.MethodModel`."""

    peft_type = "LORA"

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter that combines other adapters with weights; see `peft_lora.add_weighted_adapter`."""
        return self._peft_index.operation("add_weighted_adapter")(self, adapters, weights, adapter_name, *args, **kwargs)  # type: ignore[misc]


class LoHaModel(BaseTuner):
    """A base with LoHa adapters; see `peft_core.MethodModel`."""

    peft_type = "LOHA"


class TrainableTokensModel(BaseTuner):
    """A base with trainable embedding rows of some tokens; see `peft_core.MethodModel`."""

    peft_type = "TRAINABLE_TOKENS"


_KINDS: dict[str, type[BaseTuner]] = {"LORA": LoraModel, "LOHA": LoHaModel, "TRAINABLE_TOKENS": TrainableTokensModel}
for _name in ("BaseTuner", *(kind.__name__ for kind in _KINDS.values())):
    globals()[_name].__module__ = "peft"


def model_class(config: PeftConfig) -> type[BaseTuner]:
    """Return the class of `base_model` for adapters with `config`: the class set in `PEFT_TYPE_TO_TUNER_MAPPING`, else the method's default class."""
    method = str(config.peft_type)
    told = PEFT_TYPE_TO_TUNER_MAPPING.get(method)
    if isinstance(told, type) and issubclass(told, BaseTuner):
        return told
    if method not in _KINDS:
        name = re.sub("Config$", "", type(config).__name__) + "Model"
        members = {"peft_type": method, "__module__": "peft", "__doc__": f"A base with {method} adapters."}
        kind: Any = type(BaseTuner)
        _KINDS[method] = kind(name, (BaseTuner,), members)
    return _KINDS[method]


def stand_for(index: AdapterIndex, config: PeftConfig, called: nn.Module) -> BaseTuner:
    """Return a tuner model of the class for `config`, for the adapters of `index`; its `forward` calls `called`.

    When further adapters are added, methods that were replaced in its class are called.
    """
    index.review = seams = seams_of(index, config, called)
    return seams.tuner


def seams_of(index: AdapterIndex, config: PeftConfig, called: nn.Module | None = None) -> Seams:
    """Return the `Seams` object that calls replaced methods of the class for `config` when an adapter is added to `index`."""
    kind = model_class(config)
    made = kind.__new__(kind)
    TunerModel.__init__(made, index, called, restores_base=False)  # upstream's training recipes expect that the base is not restored
    return Seams(made)


#: names of the methods that a `PeftModel` delegates to its `base_model`, if that is an object of one of these classes
DELEGATED = tuple(name for name, value in vars(AdapterOperations).items() if not name.startswith("_") and inspect.isfunction(value))
