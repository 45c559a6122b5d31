"""Upstream's dictionaries from method to class, and upstream's function for registering a method."""

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
    """A dict: method → class, for all installed methods. A class is imported when its key is read. Keys are `PeftType` members or plain strings."""

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


#: method → its config class
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = _ByMethod(registry.config_class)
#: method → its tuner class
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, Any] = _ByMethod(registry.tuner_class)
#: method → model class in which the method can be mixed with other methods; every method can be mixed
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, Any] = _ByMethod(lambda peft_type: PeftMixedModel)
#: method → the prefix of its parameter names
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, Any] = _ByMethod(lambda peft_type: registry.resolve(peft_type).parameter_prefix)
#: methods that can be mixed: the methods that adapt layers
COMPATIBLE_TUNER_TYPES = tuple(PeftType(name) for name in ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"))
#: model type → function that converts keys and values to the model's cache format; empty, because transformers has its own cache classes now
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


def register_peft_method(*, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False) -> None:
    """Register a method for this process only. The methods of an installed package are registered automatically: see docs/write-a-tuner.md.

    Args:
        name: the name of the method, in lower case.
        config_cls: a subclass of `PeftConfig`.
        model_cls: a subclass of `TunerBase`.
        prefix: the prefix of the method's parameter names; default: ``name + "_"``.
        is_mixed_compatible: ignored, because every method can be mixed.

    Raises:
        ConfigError: `name` is not in lower case, or `config_cls` or `model_cls` is not a subclass of the required class.
        DuplicateTunerError: a method with this name is registered already.
    """
    if name != name.lower():
        raise ConfigError(f"The name of the PEFT method should be in lower case letters, got {name}.", hint=f"write {name.lower()!r}")
    for what, cls, kind in (("config_cls", config_cls, PeftConfig), ("model_cls", model_cls, TunerBase)):
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise ConfigError(f"{what}={cls!r} is no subclass of {kind.__name__}", hint="see docs/write-a-tuner.md")
    if name.upper() in registry.names():
        raise DuplicateTunerError(f"There is already PEFT method called '{name}', please choose a unique name.")
    register_tuner(TunerSpec(peft_type=name.upper(), config=config_cls, tuner=model_cls, parameter_prefix=prefix or f"{name}_"))
