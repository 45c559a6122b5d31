"""Finds the initialiser and the variant that a config asks for, and all checkpoint layouts, in this package and in plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_core.errors import ConfigError, did_you_mean

from .offers import initializer_specs, layout_specs, load, variant_specs

if TYPE_CHECKING:
    from .config import LoraConfig
    from .contracts import CheckpointLayout, Extension, Initializer, Variant

#: the initialiser class for `init_lora_weights=True` and `False`
PLAIN = "peft_lora.initializers.plain:Plain"


def initializer_of(config: LoraConfig) -> Initializer:
    """Return a new initialiser for an adapter with this config.

    Raises:
        ConfigError: no installed initialiser has the name in `init_lora_weights`, or the config is not valid for the initialiser.
        PluginError: the initialiser's class can't be imported.
    """
    return initializer_class(config)(config)


def initializer_class(config: LoraConfig) -> type[Initializer]:
    """Return the class of the initialiser that a config asks for. Raises the same errors as `initializer_of`."""
    word = config.init_lora_weights
    specs = initializer_specs() if isinstance(word, str) else ()
    place = next((spec.place for spec in specs if spec.matches(str(word))), PLAIN if isinstance(word, bool) else None)
    if place is None:
        known = [spec.key for spec in specs]
        raise ConfigError(
            f"init_lora_weights={word!r} is unknown",
            hint=did_you_mean(str(word), known) or f"write True, False or one of {', '.join(map(repr, known))}",
        )
    found: type[Initializer] = load(place)
    return found


def variant_of(config: LoraConfig) -> type[Variant] | None:
    """Return the class of the variant that a config asks for, after checking the config for this variant; None for plain LoRA.

    Raises:
        ConfigError: the config asks for several variants or for an unknown one, or it is not valid for the variant.
        PluginError: the variant's class can't be imported.
    """
    found = variant_class(config)
    if found is not None:
        found.check(config)
    return found


def variant_class(config: LoraConfig) -> type[Variant] | None:
    """Return the class of the variant that a config asks for, without checking the config for it. Raises the same errors as `variant_of`."""
    specs = variant_specs()
    if config.variant is not None and config.variant not in {spec.name for spec in specs}:
        known = [spec.name for spec in specs]
        raise ConfigError(
            f"variant={config.variant!r} is unknown", hint=did_you_mean(config.variant, known) or f"installed are {', '.join(map(repr, known))}"
        )
    # if several specs have the same name, the first one is used
    chosen = list({spec.name: spec for spec in reversed(specs) if spec.chosen(config)}.values())
    if not chosen:
        return None
    if len(chosen) > 1:
        raise ConfigError(f"the config asks for several variants of LoRA: {', '.join(spec.name for spec in chosen)}", hint="an adapter has one")
    found: type[Variant] = load(chosen[0].place)
    return found


def extensions_of(config: LoraConfig) -> tuple[type[Extension], ...]:
    """Return the initialiser class and the variant class (if any) of a config, without checking the config for them.

    Raises the same errors as `initializer_of` and `variant_of`.
    """
    initializer, variant = initializer_class(config), variant_class(config)
    return (initializer,) if variant is None else (initializer, variant)


def layouts() -> tuple[type[CheckpointLayout], ...]:
    """Return the classes that read adapters for bases in another layout, those of plugins first.

    Raises:
        PluginError: one of the classes can't be imported.
    """
    return tuple(load(spec.place) for spec in layout_specs())
