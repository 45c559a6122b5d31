"""All registered initialisers, variants and layouts, ours and those of plugins, and the functions that they add to models. Imports no torch."""

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
    """Return all initialisers; those of plugins come first, so that a plugin may replace one of ours."""
    return registry.offers("peft_lora_initializers", "LORA")


def variant_specs() -> tuple[VariantSpec, ...]:
    """Return all variants; those of plugins come first."""
    return registry.offers("peft_lora_variants", "LORA")


def layout_specs() -> tuple[LayoutSpec, ...]:
    """Return all alternative layouts of bases from which adapters can be loaded; those of plugins come first."""
    return registry.offers("peft_lora_layouts", "LORA")


def extension_specs() -> tuple[ExtensionSpec, ...]:
    """Return all initialisers and variants; if several of them define the same name, the first one is used."""
    return (*initializer_specs(), *variant_specs())


def operations(specs: Sequence[ExtensionSpec]) -> dict[str, Callable[..., Any]]:
    """Return name → function for the functions that initialisers and variants add to models; each one is imported when it is first called."""
    return {name: Operation(place) for spec in reversed(specs) for name, place in spec.operations.items()}


def call_arguments(specs: Sequence[ExtensionSpec]) -> tuple[str, ...]:
    """Return the names of the keyword arguments of a model call that are consumed by initialisers and variants."""
    return tuple(dict.fromkeys([name for spec in specs for name in spec.call_arguments]))


@dataclass(frozen=True)
class Operation:
    """A callable that imports its function when it is called.

    Args:
        place: the function, or its import path ``"package.module:function"``.
    """

    place: str | Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return load(self.place)(*args, **kwargs)


@functools.cache
def load(place: Any) -> Any:
    """Import and return the object at an import path ``"package.module:Name"``; a `place` that is no string is returned unchanged.

    Raises:
        PluginError: the object can't be imported.
    """
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise PluginError(f"{place!r} can't be imported: {type(error).__name__}: {error}", hint="reinstall the package that offers it") from error
