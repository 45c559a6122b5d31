"""The declaration of a tuner, read before its code is imported."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..tensor_names import WRAPPER_PREFIX


class Capability(enum.Flag):
    """Optional abilities of a tuner, in addition to forward, training, saving and loading. Core refuses operations whose ability is not declared."""

    NONE = 0
    MERGE = enum.auto()  #: its effect can be folded into the base weight
    PER_SAMPLE = enum.auto()  #: each row of a batch may use another adapter
    CONV = enum.auto()  #: wraps convolutions
    EMBEDDING = enum.auto()  #: wraps embeddings
    QUANTISED = enum.auto()  #: wraps quantised layers
    HOTSWAP = enum.auto()  #: weights can be replaced in place, also in a compiled model


@dataclass(frozen=True)
class TunerSpec:
    """The declaration of one tuner: its name, the location of its classes, the format of its file keys, and its capabilities.

    Args:
        peft_type: upper-case name, as in `adapter_config.json`.
        config: `PeftConfig` subclass, or its import path ``"package.module:Class"`` (then nothing is imported until needed).
        tuner: `TunerBase` subclass, or its import path.
        parameter_prefix: prefix of the tuner's parameter names (``"lora_"``); must not collide with an adapter's name.
        base_prefix: prefix of base module paths in weight files: ``"base_model.model."`` for tuners that wrap
            layers, ``"base_model."`` for those that don't modify the base.
        call_arguments: keyword arguments of a model call that are passed to the tuner and not to the base model.
        tags: tags for the model card, by which the Hub can be searched.
        capabilities: the tuner's optional abilities; `Capability.NONE` by default.
        examples: name → config fields of an example; the conformance suite uses these as configs unless it defines its own configs.
            The extra key ``"base"`` names a model of `peft_core.testing.BASES`.

    Raises:
        ConfigError: the name, an import path or an example is malformed, or `parameter_prefix` is empty.
    """

    peft_type: str
    config: str | type
    tuner: str | type
    parameter_prefix: str
    base_prefix: str = WRAPPER_PREFIX
    call_arguments: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    capabilities: Capability = Capability.NONE
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.peft_type):
            raise ConfigError(f"peft_type={self.peft_type!r} is not an upper-case identifier", hint="write for example 'MY_TUNER'")
        if not self.parameter_prefix:
            raise ConfigError(f"the tuner {self.peft_type} has an empty parameter_prefix", hint="write for example 'my_'")
        for attribute in ("config", "tuner"):
            given = getattr(self, attribute)
            if isinstance(given, str) and not re.fullmatch(r"[\w.]+:\w+", given):
                raise ConfigError(
                    f"{attribute}={given!r} of the tuner {self.peft_type} must be 'package.module:Class'",
                    hint="write where its class is imported from",
                )
        for name, example in self.examples.items():
            if not isinstance(example, Mapping):
                raise ConfigError(f"the example {name!r} of the tuner {self.peft_type} is a {type(example).__name__}", hint="give fields of a config")

    def can(self, capability: Capability) -> bool:
        """Return whether the tuner declares `capability`."""
        return capability in self.capabilities
