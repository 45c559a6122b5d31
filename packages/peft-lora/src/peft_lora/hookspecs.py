"""The hooks that peft-lora owns: what a new adapter starts as, and variants of its formula. Imports no torch.

Implement them in a module with an entry point in the group `peft_core.plugins`, as for any hook of core; peft-lora's own are in `plugin.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft_core.errors import ConfigError
from peft_core.plugins import hookspec


@dataclass(frozen=True)
class InitializerSpec:
    """One way to start: what `init_lora_weights` says to choose it, and where its class is.

    Args:
        name: a word, or a regular expression for the whole word (``"pissa_niter_[0-9]+"``).
        place: `Initializer` subclass, or its place as ``"package.module:Class"``; then it is imported when it is used.
        shown: how messages name it; default `name`.

    Raises:
        ConfigError: `place` is no place of a class.
    """

    name: str
    place: str | type
    shown: str = ""

    def __post_init__(self) -> None:
        _check_place(self.place)

    def matches(self, word: str) -> bool:
        """Return whether `init_lora_weights=word` means this one."""
        return re.fullmatch(self.name, word) is not None


@dataclass(frozen=True)
class VariantSpec:
    """One variant of LoRA: which configs ask for it, and where its class is.

    Args:
        name: a word; `LoraConfig(variant=name)` asks for it.
        place: `Variant` subclass, or its place as ``"package.module:Class"``; then it is imported when it is used.
        field: the config field that asks for it when it is set (``"use_dora"``); None: only `variant` does.

    Raises:
        ConfigError: `place` is no place of a class.
    """

    name: str
    place: str | type
    field: str | None = None

    def __post_init__(self) -> None:
        _check_place(self.place)

    def chosen(self, config: Any) -> bool:
        """Return whether a config asks for it."""
        return config.variant == self.name or bool(self.field and getattr(config, self.field, None))


def _check_place(place: str | type) -> None:
    if isinstance(place, str) and not re.fullmatch(r"[\w.]+:\w+", place):
        raise ConfigError(f"{place!r} is no place of a class", hint="write 'package.module:Class'")


@hookspec
def peft_lora_initializers() -> Iterable[InitializerSpec]:  # type: ignore[empty-body]
    """Offer ways to start a new adapter, chosen with `LoraConfig(init_lora_weights=name)`.

    Example:
        >>> @hookimpl
        ... def peft_lora_initializers():
        ...     yield InitializerSpec("sparse", "my_package.sparse:Sparse")
    """


@hookspec
def peft_lora_variants() -> Iterable[VariantSpec]:  # type: ignore[empty-body]
    """Offer variants of the formula, chosen with `LoraConfig(variant=name)`.

    Example:
        >>> @hookimpl
        ... def peft_lora_variants():
        ...     yield VariantSpec("gated", "my_package.gated:Gated")
    """
