"""`PeftModel.base_model` of tuners that wrap layers: a module with the base as `.model` and the operations on its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base.wrappers import unwrapped
from ..config import PeftConfig
from ..errors import AdapterNameError, AdapterNotFoundError, ModelError
from ..layers.init_options import InitOptions
from ..operations.add import add_adapter
from ..tuners.index import ATTRIBUTE, AdapterIndex
from .adapter_operations import AdapterOperations
from .chosen_modules import view_for_state_dict
from .write_through import WriteThrough


class TunerModel(WriteThrough, AdapterOperations):
    """Has the base model as its submodule `model`, and the operations on its adapters. Hence parameter names begin with `base_model.model.`.

    Args:
        index: the adapters of the base.
        model: the module that `forward` calls: the base, or a wrapper of another library around the base. None: the base.
        restores_base: the `restores_base` of the `PeftModel` whose `base_model` this is.
    """

    def __init__(self, index: AdapterIndex, model: nn.Module | None = None, restores_base: bool = True) -> None:
        super().__init__()
        self.model = index.base if model is None else model
        self.restores_base = restores_base
        self.__dict__[ATTRIBUTE] = index

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs, by adapter name."""
        return self._peft_index.configs

    @property
    def prefix(self) -> str:
        """The prefix of parameter names (``"lora_"``) of the first adapter's method.

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
        """Add an adapter whose config the caller has put into `peft_config`. The new adapter is neither active nor trainable.

        Args:
            model: the base; must be `self.model`.
            adapter_name: the adapter's key in `peft_config`.
            autocast_adapter_dtype: create the adapter's weights in float32 if they would be float16 or bfloat16.
            low_cpu_mem_usage: create the weights on the meta device, to be loaded later.
            state_dict: its keys (not the values) decide which modules are adapted, instead of the config.

        Raises:
            AdapterNotFoundError: `peft_config` has no config of this name.
            AdapterNameError: the adapter has been added already.
            ModelError: `model` is not `self.model`.
            others: as in `inject_adapter_in_model`. After any error the model and `peft_config` are unchanged.
        """
        index = self._peft_index
        index.require(adapter_name)
        if unwrapped(model) is not index.base:
            raise ModelError(f"model is not the base of this {type(self).__name__}, a {type(index.base).__name__}", hint="pass its `.model`")
        if adapter_name in index.keys_by_adapter:
            raise AdapterNameError(f"the adapter {adapter_name!r} already exists", hint="delete_adapter it first, or take another name")
        config = index.configs.pop(adapter_name)
        try:
            view = None if state_dict is None else view_for_state_dict(index, config, adapter_name, state_dict)
            add_adapter(
                index,
                adapter_name,
                config,
                init_options=InitOptions(meta=low_cpu_mem_usage, autocast=autocast_adapter_dtype, from_file=state_dict is not None),
                view=view,
                mount_on=self,
            )
        except BaseException:
            index.configs[adapter_name] = config
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with `args` and `kwargs`."""
        return self.model(*args, **kwargs)

    def _wrapped_base(self) -> nn.Module:
        return self.model

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return the config of `model` as a dict; ``{"model_type": "custom"}`` if it has none."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        as_dict: dict[str, Any] = dict(config) if isinstance(config, dict) else config.to_dict()
        return as_dict

    def __getattr__(self, name: str) -> Any:
        """Return a submodule or parameter, else an operation that a tuner adds to the model, else the base's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # while a copy or unpickled model is created, `model` is not set: looking it up below would recurse endlessly
                raise
            operation = self._operation(name)
            return getattr(_having(name, self.model), name) if operation is None else operation


def _having(name: str, model: nn.Module) -> nn.Module:
    """Return `model` if it has the attribute `name`; otherwise the model inside other libraries' wrappers, which may hide its attributes."""
    inner = unwrapped(model)
    return model if inner is model or hasattr(model, name) else inner
