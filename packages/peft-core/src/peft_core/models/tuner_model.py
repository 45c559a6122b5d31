"""What `base_model` shows for tuners that wrap layers: the base under `.model`, with the operations on its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..errors import AdapterNameError, AdapterNotFoundError, ModelError
from ..layers.init_options import InitOptions
from ..operations.add import add_adapter
from ..tuners.index import ATTRIBUTE, AdapterIndex
from .adapter_operations import AdapterOperations
from .chosen_modules import chosen_by
from .write_through import WriteThrough


class TunerModel(WriteThrough, AdapterOperations):
    """The base model as `model`, plus the operations on its adapters. Parameter names go through it: `base_model.model.…`.

    Args:
        index: the adapters of the base.
        restores_base: as of the model that this is `base_model` of.
    """

    def __init__(self, index: AdapterIndex, restores_base: bool = True) -> None:
        super().__init__()
        self.model = index.base
        self.restores_base = restores_base
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
