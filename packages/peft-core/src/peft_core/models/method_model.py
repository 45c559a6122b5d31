"""Classes that stand for "the base with adapters of one method", as `LoraModel` does in code written for other frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..config import PeftConfig
from ..errors import ConfigError
from ..tuners.index import require_index
from .factory import inject_adapter_in_model
from .tuner_model import TunerModel


class _OfMethod(type(nn.Module)):  # type: ignore[misc]
    """An instance is any `TunerModel` with an adapter of the method; calling the class makes one."""

    peft_type: str | None

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, TunerModel):
            return False
        return cls.peft_type is None or any(str(config.peft_type) == cls.peft_type for config in instance.peft_config.values())

    def __call__(
        cls,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> TunerModel:
        config = peft_config.get(adapter_name) if isinstance(peft_config, Mapping) else peft_config
        if not isinstance(config, PeftConfig) or (cls.peft_type is not None and str(config.peft_type) != cls.peft_type):
            kind = (
                f"none for {adapter_name!r}"
                if config is None
                else f"a config of {config.peft_type}"
                if isinstance(config, PeftConfig)
                else type(config).__name__
            )
            raise ConfigError(f"{cls.__name__} takes a config of {cls.peft_type}, and there is {kind}")
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)
        return TunerModel(require_index(model), model)


class MethodModel(TunerModel, metaclass=_OfMethod):
    """A base with adapters of one method, without the wrapper that `get_peft_model` puts around it.

    A subclass names its method. Calling it adds an adapter to a model in place, as `inject_adapter_in_model`, and returns a `TunerModel`;
    ``isinstance`` says whether a `TunerModel` has adapters of the method.

    Args:
        model: the base, changed in place.
        peft_config: the config, or a mapping from adapter to config.
        adapter_name: the adapter's name.
        low_cpu_mem_usage, state_dict: as `inject_adapter_in_model`.

    Raises:
        ConfigError: the config is of another method.
        others: as `inject_adapter_in_model`; the model is as before.
    """

    peft_type: ClassVar[str | None] = None

    if TYPE_CHECKING:  # what calling the class takes; its metaclass does it

        def __init__(
            self,
            model: nn.Module,
            peft_config: PeftConfig | Mapping[str, PeftConfig],
            adapter_name: str = "default",
            low_cpu_mem_usage: bool = False,
            state_dict: Mapping[str, Any] | None = None,
        ) -> None: ...
