"""The hooks that peft-lora owns: what a new adapter starts as, variants of its formula, other layouts of bases. Imports no torch.

Implement them in a module with an entry point in the group `peft_core.plugins`, as for any hook of core; peft-lora's own are in `plugin.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_core.errors import ConfigError
from peft_core.plugins import hookspec


@dataclass(frozen=True)
class ExtensionSpec:
    """What an initialiser and a variant say about themselves before any of their code runs.

    Args:
        name: a word.
        place: the class, or its place as ``"package.module:Class"``; then it is imported when it is used.
        settings: dataclass of its settings, or its place; the module should import no torch, since configs are made without it. An object or a dict
            of its fields goes into ``LoraConfig(plugin_settings={name: ...})``, is checked by the class, and comes back from files.
        operations: functions for models with LoRA adapters, or their places: ``model.name(...)`` calls ``operations["name"](model, ...)``.
        call_arguments: keywords of a model call that are for it (`Call.arguments`), and that the base never sees.

    Raises:
        ConfigError: a place is not written as ``"package.module:Class"``.
    """

    name: str
    place: str | type
    settings: str | type | None = field(default=None, kw_only=True)
    operations: Mapping[str, str | Callable[..., Any]] = field(default_factory=dict, kw_only=True, hash=False)
    call_arguments: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for place in (self.place, self.settings, *self.operations.values()):
            _check_place(place)

    @property
    def key(self) -> str:
        """What its settings are called in `LoraConfig.plugin_settings`."""
        return self.name


@dataclass(frozen=True)
class InitializerSpec(ExtensionSpec):
    """One way to start: what `init_lora_weights` says to choose it, and where its `Initializer` subclass is.

    Args:
        name: a word, or a regular expression for the whole word (``"pissa_niter_[0-9]+"``).
        shown: how messages name it; default `name`.
    """

    shown: str = ""

    @property
    def key(self) -> str:
        """What its settings are called: `shown`, where the name is an expression."""
        return self.shown or self.name

    def matches(self, word: str) -> bool:
        """Return whether `init_lora_weights=word` means this one."""
        return re.fullmatch(self.name, word) is not None


@dataclass(frozen=True)
class VariantSpec(ExtensionSpec):
    """One variant of LoRA: which configs ask for it, and where its `Variant` subclass is.

    Args:
        name: a word; `LoraConfig(variant=name)` asks for it.
        field: the config field that asks for it when it is set (``"use_dora"``); None: only `variant` does.
    """

    field: str | None = None

    def chosen(self, config: Any) -> bool:
        """Return whether a config asks for it."""
        return config.variant == self.name or bool(self.field and getattr(config, self.field, None))


@dataclass(frozen=True)
class LayoutSpec:
    """Adapters for bases in another layout, and where the `CheckpointLayout` subclass is that reads them.

    Args:
        name: for messages.
        place: the class, or its place as ``"package.module:Class"``; then it is imported when it is used.

    Raises:
        ConfigError: the place is not written as ``"package.module:Class"``.
    """

    name: str
    place: str | type

    def __post_init__(self) -> None:
        _check_place(self.place)


def _check_place(place: Any) -> None:
    if isinstance(place, str) and not re.fullmatch(r"[\w.]+:\w+", place):
        raise ConfigError(f"{place!r} must be written as 'package.module:Name'")


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


@hookspec
def peft_lora_layouts() -> Iterable[LayoutSpec]:  # type: ignore[empty-body]
    """Offer readers of adapters that were written for a base in another layout: each expert a module, say, where all are one parameter now.

    Example:
        >>> @hookimpl
        ... def peft_lora_layouts():
        ...     yield LayoutSpec("packed attention", "my_package.packed:PackedAttention")
    """
