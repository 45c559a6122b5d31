"""Hook specifications of peft-lora: initialisers of new adapters, variants of LoRA, layouts of base models. This module does not import torch.

Implement them in a module with an entry point in the group `peft_core.plugins`, as for any hook of peft-core; the implementations of peft-lora are in
`plugin.py`.
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
    """Declaration of an initialiser or a variant, which can be read before any of its code is imported.

    Args:
        name: a word, the name by which a config selects the extension.
        place: the class, or its import path as ``"package.module:Class"``, which is imported on first use.
        settings: dataclass of the extension's settings, or its import path. Its module should not import torch, since configs are created without
            torch. Users pass an instance, or a dict of its fields, in ``LoraConfig(plugin_settings={name: ...})``; the dataclass validates the
            values, and they are restored when a config is loaded from a file.
        operations: functions for models with LoRA adapters, or their import paths: ``model.name(...)`` calls ``operations["name"](model, ...)``.
        call_arguments: keyword arguments of a model call that are meant for the extension (`Call.arguments`) and are not passed to the base model.

    Raises:
        ConfigError: an import path is not written as ``"package.module:Class"``.
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
        """The key of the extension's settings in `LoraConfig.plugin_settings`."""
        return self.name


@dataclass(frozen=True)
class InitializerSpec(ExtensionSpec):
    """Declaration of an initialiser: the value of `init_lora_weights` that selects it, and its `Initializer` subclass.

    Args:
        name: a word, or a regular expression that must match the whole word (``"pissa_niter_[0-9]+"``).
        shown: the name of the initialiser in messages; default `name`.
    """

    shown: str = ""

    @property
    def key(self) -> str:
        """The key of the initialiser's settings in `LoraConfig.plugin_settings`: `shown` if it is given, otherwise `name`."""
        return self.shown or self.name

    def matches(self, word: str) -> bool:
        """Return whether `init_lora_weights=word` selects this initialiser."""
        return re.fullmatch(self.name, word) is not None


@dataclass(frozen=True)
class VariantSpec(ExtensionSpec):
    """Declaration of a variant of LoRA: which configs select it, and its `Variant` subclass.

    Args:
        name: a word; `LoraConfig(variant=name)` selects the variant.
        field: a config field that also selects the variant when it is true (``"use_dora"``); None: only `LoraConfig(variant=name)` selects it.
    """

    field: str | None = None

    def chosen(self, config: Any) -> bool:
        """Return whether a config selects this variant."""
        return config.variant == self.name or bool(self.field and getattr(config, self.field, None))


@dataclass(frozen=True)
class LayoutSpec:
    """Declaration of a `CheckpointLayout` subclass, which reads adapters made for a base model with another module layout.

    Args:
        name: the layout's name, for messages.
        place: the class, or its import path as ``"package.module:Class"``, which is imported on first use.

    Raises:
        ConfigError: the import path is not written as ``"package.module:Class"``.
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
    """Return initialisers for new adapters, selected with `LoraConfig(init_lora_weights=name)`.

    Example:
        >>> @hookimpl
        ... def peft_lora_initializers():
        ...     yield InitializerSpec("sparse", "my_package.sparse:Sparse")
    """


@hookspec
def peft_lora_variants() -> Iterable[VariantSpec]:  # type: ignore[empty-body]
    """Return variants of LoRA, selected with `LoraConfig(variant=name)`.

    Example:
        >>> @hookimpl
        ... def peft_lora_variants():
        ...     yield VariantSpec("gated", "my_package.gated:Gated")
    """


@hookspec
def peft_lora_layouts() -> Iterable[LayoutSpec]:  # type: ignore[empty-body]
    """Return readers of adapters that were made for a base model with another module layout.

    For example, each expert was a module of its own then, and all experts are one parameter now.

    Example:
        >>> @hookimpl
        ... def peft_lora_layouts():
        ...     yield LayoutSpec("packed attention", "my_package.packed:PackedAttention")
    """
