"""The base class of classes such as `LoraModel`: a base model with adapters of one method, for code written for other frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..config import PeftConfig
from ..errors import ConfigError
from ..tuners.index import AdapterIndex, index_of, require_index
from ..tuners.review import InjectionReview
from .factory import inject
from .tuner_model import TunerModel


class _OfMethod(type(nn.Module)):  # type: ignore[misc]
    """The metaclass of `MethodModel`: it changes what ``isinstance(model, cls)`` returns.

    For a class that sets `peft_type` itself, the result is True for any `TunerModel` with an adapter of this method (of any method if `peft_type` is
    None). For a class that only inherits `peft_type`, the ordinary rule applies.
    """

    peft_type: str | None

    def __instancecheck__(cls, instance: Any) -> bool:
        if "peft_type" not in cls.__dict__:
            return bool(super().__instancecheck__(instance))
        if not isinstance(instance, TunerModel):
            return False
        return cls.peft_type is None or any(str(config.peft_type) == cls.peft_type for config in instance.peft_config.values())


class MethodModel(TunerModel, metaclass=_OfMethod):
    """A base with adapters of one method, without the wrapper that `get_peft_model` puts around it.

    A subclass sets `peft_type` to its method. Instantiating it adds an adapter to a model in place, as `inject_adapter_in_model` does. If the model
    already has an adapter of this name with the same config object, nothing is added. ``isinstance(model, subclass)`` is True for a `TunerModel`
    that has an adapter of the method.

    Args:
        model: the base, changed in place.
        peft_config: the config, or a mapping from adapter name to config.
        adapter_name: the adapter's name.
        low_cpu_mem_usage, state_dict: as in `inject_adapter_in_model`.

    Raises:
        ConfigError: the config belongs to another method, or there is none for `adapter_name`.
        others: as in `inject_adapter_in_model`; the model is unchanged.
    """

    peft_type: ClassVar[str | None] = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        config = self._checked(peft_config, adapter_name)
        index = index_of(model)
        if index is None or index.configs.get(adapter_name) is not config:
            inject(config, model, adapter_name, low_cpu_mem_usage, state_dict, self._review)
        super().__init__(require_index(model), model, getattr(self, "restores_base", True))

    def _review(self, index: AdapterIndex) -> InjectionReview:
        """Return the `InjectionReview` that is used while this object injects an adapter; subclasses may override it."""
        return index.review

    def _checked(self, given: PeftConfig | Mapping[str, PeftConfig], adapter_name: str) -> PeftConfig:
        config = given.get(adapter_name) if isinstance(given, Mapping) else given
        if isinstance(config, PeftConfig) and self.peft_type in (None, str(config.peft_type)):
            return config
        found = f"a config of {config.peft_type!s}" if isinstance(config, PeftConfig) else type(config).__name__
        raise ConfigError(
            f"{type(self).__name__} takes a config of {self.peft_type}, and there is {f'none for {adapter_name!r}' if config is None else found}"
        )
