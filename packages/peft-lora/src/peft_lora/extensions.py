"""Finding the initialiser and the variant that a config asks for, and the layouts that are known, among ours and those of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_core.errors import ConfigError, did_you_mean

from .offers import initializer_specs, layout_specs, load, variant_specs

if TYPE_CHECKING:
    from .config import LoraConfig
    from .contracts import CheckpointLayout, Extension, Initializer, Variant

#: what `init_lora_weights=True` and `False` mean
PLAIN = "peft_lora.initializers.plain:Plain"


def initializer_of(config: LoraConfig) -> Initializer:
    """Return a new initialiser for an adapter with this config.

    Raises:
        ConfigError: nothing installed has the name that `init_lora_weights` gives, or the config does not suit it.
        PluginError: its class can't be imported.
    """
    return initializer_class(config)(config)


def initializer_class(config: LoraConfig) -> type[Initializer]:
    """Return the class of the initialiser that a config asks for. Errors as `initializer_of`."""
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
    """Return the class of the variant that a config asks for, which the config suits; None for plain LoRA.

    Raises:
        ConfigError: it asks for several, for one that nobody offers, or does not suit it.
        PluginError: its class can't be imported.
    """
    found = variant_class(config)
    if found is not None:
        found.check(config)
    return found


def variant_class(config: LoraConfig) -> type[Variant] | None:
    """Return the class of the variant that a config asks for, unchecked. Errors as `variant_of`."""
    specs = variant_specs()
    if config.variant is not None and config.variant not in {spec.name for spec in specs}:
        known = [spec.name for spec in specs]
        raise ConfigError(
            f"variant={config.variant!r} is unknown", hint=did_you_mean(config.variant, known) or f"installed are {', '.join(map(repr, known))}"
        )
    # the first of a name counts
    chosen = list({spec.name: spec for spec in reversed(specs) if spec.chosen(config)}.values())
    if not chosen:
        return None
    if len(chosen) > 1:
        raise ConfigError(f"the config asks for several variants of LoRA: {', '.join(spec.name for spec in chosen)}", hint="an adapter has one")
    found: type[Variant] = load(chosen[0].place)
    return found


def extensions_of(config: LoraConfig) -> tuple[type[Extension], ...]:
    """Return the classes of both, unchecked. Errors as `initializer_of` and `variant_of`."""
    initializer, variant = initializer_class(config), variant_class(config)
    return (initializer,) if variant is None else (initializer, variant)


def layouts() -> tuple[type[CheckpointLayout], ...]:
    """Return the classes that read adapters for bases in another layout, those of plugins first.

    Raises:
        PluginError: one can't be imported.
    """
    return tuple(load(spec.place) for spec in layout_specs())
