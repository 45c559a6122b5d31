"""All initialisers, variants and layouts that are offered, ours and those of plugins, and what they add to models. Imports no torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_core.errors import PluginError
from peft_core.plugins import registry

from .hookspecs import ExtensionSpec, InitializerSpec, LayoutSpec, VariantSpec


def initializer_specs() -> tuple[InitializerSpec, ...]:
    """Return all initialisers, those of plugins first: a plugin may replace one of ours."""
    return registry.offers("peft_lora_initializers", "LORA")


def variant_specs() -> tuple[VariantSpec, ...]:
    """Return all variants, those of plugins first."""
    return registry.offers("peft_lora_variants", "LORA")


def layout_specs() -> tuple[LayoutSpec, ...]:
    """Return all other layouts of bases whose adapters can be read, those of plugins first."""
    return registry.offers("peft_lora_layouts", "LORA")


def extension_specs() -> tuple[ExtensionSpec, ...]:
    """Return initialisers and variants; where several have a name for something, the first counts."""
    return (*initializer_specs(), *variant_specs())


def operations(specs: Sequence[ExtensionSpec]) -> dict[str, Callable[..., Any]]:
    """Return the functions that initialisers and variants add to models, by name; each is imported when it is called."""
    return {name: Operation(place) for spec in reversed(specs) for name, place in spec.operations.items()}


def call_arguments(specs: Sequence[ExtensionSpec]) -> tuple[str, ...]:
    """Return the keywords of a model call that are for initialisers and variants."""
    return tuple(dict.fromkeys([name for spec in specs for name in spec.call_arguments]))


@dataclass(frozen=True)
class Operation:
    """A function that is imported when it is called.

    Args:
        place: the function, or ``"package.module:function"``.
    """

    place: str | Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return load(self.place)(*args, **kwargs)


@functools.cache
def load(place: Any) -> Any:
    """Return what is at a place ``"package.module:Name"``; anything else as it is.

    Raises:
        PluginError: it can't be imported.
    """
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise PluginError(f"{place!r} can't be imported: {type(error).__name__}: {error}", hint="reinstall the package that offers it") from error
