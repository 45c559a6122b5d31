"""Method → class, as dictionaries that code written for other frameworks reads, and registering a method in its words."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from peft_core.config import PeftConfig, PeftType
from peft_core.errors import ConfigError, DuplicateTunerError, UnknownTunerError
from peft_core.models.mixed_model import PeftMixedModel
from peft_core.plugins import TunerSpec, register_tuner
from peft_core.plugins.registry import registry
from peft_core.tuners.tuner import TunerBase


class _ByMethod(dict[str, Any]):
    """Method → class, of all methods that are installed, imported when somebody asks; `PeftType` members and plain strings are equal keys."""

    def __init__(self, find: Any) -> None:
        super().__init__()
        self._find = find

    def __iter__(self) -> Iterator[str]:
        return iter(registry.names())

    def __len__(self) -> int:
        return len(registry.names())

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __missing__(self, key: str) -> Any:
        try:
            spec = registry.resolve(str(key))
        except UnknownTunerError:
            raise KeyError(key) from None
        found = self[str(key)] = self._find(spec.peft_type)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and str(key) in registry.names())


#: method → class of its configs
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = _ByMethod(registry.config_class)
#: method → class of its tuners
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, Any] = _ByMethod(registry.tuner_class)
#: method → class of models in which it can be mixed with others: any can
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, Any] = _ByMethod(lambda peft_type: PeftMixedModel)
#: method → what the names of its parameters begin with
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, Any] = _ByMethod(lambda peft_type: registry.resolve(peft_type).parameter_prefix)
#: methods that can be mixed: those whose classes change layers
COMPATIBLE_TUNER_TYPES = tuple(PeftType(name) for name in ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"))
#: model type → what makes a cache of keys and values; nothing has to since transformers has caches of its own
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


def register_peft_method(*, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False) -> None:
    """Register a method for this process. A package that is installed registers itself: see docs/write-a-tuner.md.

    Args:
        name: lower-case.
        config_cls: a `PeftConfig` subclass.
        model_cls: a `TunerBase` subclass.
        prefix: what the names of its parameters begin with; default ``name + "_"``.
        is_mixed_compatible: accepted and without an effect: every method can be mixed.

    Raises:
        ConfigError: the name is not lower-case, or a class is not of its kind.
        DuplicateTunerError: there is such a method.
    """
    if name != name.lower():
        raise ConfigError(f"The name of the PEFT method should be in lower case letters, got {name}.", hint=f"write {name.lower()!r}")
    for what, cls, kind in (("config_cls", config_cls, PeftConfig), ("model_cls", model_cls, TunerBase)):
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise ConfigError(f"{what}={cls!r} is no subclass of {kind.__name__}", hint="see docs/write-a-tuner.md")
    if name.upper() in registry.names():
        raise DuplicateTunerError(f"There is already PEFT method called '{name}', please choose a unique name.")
    register_tuner(TunerSpec(peft_type=name.upper(), config=config_cls, tuner=model_cls, parameter_prefix=prefix or f"{name}_"))
