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
    """Abilities of a tuner besides forward, training, saving and loading. Core refuses what is not declared."""

    NONE = 0
    MERGE = enum.auto()  #: its effect can be folded into the base weight
    PER_SAMPLE = enum.auto()  #: each row of a batch may use another adapter
    CONV = enum.auto()  #: wraps convolutions
    EMBEDDING = enum.auto()  #: wraps embeddings
    QUANTISED = enum.auto()  #: wraps quantised layers
    HOTSWAP = enum.auto()  #: weights can be replaced in place, also in a compiled model


@dataclass(frozen=True)
class TunerSpec:
    """One tuner: its name, where its classes are, how its files look, what it can do.

    Args:
        peft_type: upper-case name, as in `adapter_config.json`.
        config: `PeftConfig` subclass, or its import path ``"package.module:Class"`` (then nothing is imported until needed).
        tuner: `TunerBase` subclass, or its import path.
        parameter_prefix: prefix of the tuner's parameter names (``"lora_"``); must not collide with an adapter's name.
        base_prefix: prefix of base module paths in weight files: ``"base_model.model."`` for tuners that wrap
            layers, ``"base_model."`` for those that don't modify the base.
        call_arguments: keywords of a model call that belong to the tuner and that the base never sees.
        tags: what the model card says, for the Hub's search.
        capabilities: what it can do; `Capability.NONE` by default.
        examples: name → config fields of an example; the conformance suite runs these unless it is given configs.
            The extra key ``"base"`` names a model of `peft_core.testing.BASES`.

    Raises:
        ConfigError: a malformed name, import path or example.
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
