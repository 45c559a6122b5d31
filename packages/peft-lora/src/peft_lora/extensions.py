"""Finding the initialiser and the variant that a config asks for, among ours and those of plugins."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from peft_core.errors import ConfigError, PluginError, did_you_mean

from .offers import initializer_specs, variant_specs

if TYPE_CHECKING:
    from .config import LoraConfig
    from .contracts import Initializer, Variant


def initializer_of(config: LoraConfig) -> Initializer:
    """Return a new initialiser for an adapter with this config.

    Raises:
        ConfigError: nothing installed has the name that `init_lora_weights` gives, or the config does not suit it.
        PluginError: its class can't be imported.
    """
    word = config.init_lora_weights
    if isinstance(word, bool):
        from .initializers.plain import Plain

        return Plain(config)
    specs = initializer_specs()
    for spec in specs:
        if spec.matches(word):
            found: Initializer = _load(spec.place)(config)
            return found
    known = [spec.shown or spec.name for spec in specs]
    raise ConfigError(
        f"init_lora_weights={word!r} is unknown", hint=did_you_mean(word, known) or f"write True, False or one of {', '.join(map(repr, known))}"
    )


def variant_of(config: LoraConfig) -> type[Variant] | None:
    """Return the class of the variant that a config asks for; None for plain LoRA.

    Raises:
        ConfigError: it asks for several, for one that nobody offers, or does not suit it.
        PluginError: its class can't be imported.
    """
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
    found: type[Variant] = _load(chosen[0].place)
    found.check(config)
    return found


@functools.cache
def _load(place: str | type) -> Any:
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise PluginError(f"{place!r} can't be imported: {type(error).__name__}: {error}", hint="reinstall the package that offers it") from error
