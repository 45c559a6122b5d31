"""All initialisers and variants that are offered, ours and those of plugins. Imports no torch."""

from __future__ import annotations

from peft_core.plugins import registry

from .hookspecs import InitializerSpec, VariantSpec


def initializer_specs() -> list[InitializerSpec]:
    """Return all initialisers, those of plugins first: a plugin may replace one of ours."""
    registry.resolve("LORA")  # ours are known when the plugin is
    return [spec for offer in registry.manager().hook.peft_lora_initializers() for spec in offer]


def variant_specs() -> list[VariantSpec]:
    """Return all variants, those of plugins first."""
    registry.resolve("LORA")
    return [spec for offer in registry.manager().hook.peft_lora_variants() for spec in offer]
