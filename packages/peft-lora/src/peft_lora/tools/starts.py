"""Loading tensors over an adapter that started in another way: whether they belong to the same base."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from peft_core import ConfigError, Merge, PeftWarning

from ..config import INITIALIZER_SETTINGS, LoraConfig
from ..contracts import Extension
from ..extensions import initializer_of

#: fields that say only what A and B start with
START_FIELDS = frozenset({"init_lora_weights", *INITIALIZER_SETTINGS})


def shifts_of_start(adapter: str, modules: Mapping[str, Any]) -> dict[str, Merge]:
    """Return the path of each layer out of whose weight the initialisation of an adapter took something → that change.

    What a variant takes out by itself (KaSA), which it does again on every base, is not among them.

    Args:
        adapter: which adapter.
        modules: path → the layer there.
    """
    found = {}
    for path, layer in modules.items():
        merging, variant = getattr(layer, "merging", None), getattr(layer, "variants", {}).get(adapter)
        if merging is not None and adapter in merging.shifts and not (variant is not None and variant.shifts_base):
            found[path] = merging.shifts[adapter]
    return found


def check_start(adapter: str, present: LoraConfig, extensions: Collection[type[Extension]], config: LoraConfig, modules: Mapping[str, Any]) -> None:
    """Check that tensors that started in another way than an adapter can be loaded over it.

    Those whose start leaves the base alone can; over an adapter that changed its base they are taken for its own, saved with an edited config.
    Those whose start changed their base need an adapter that started so.

    Args:
        adapter: its name.
        present: its config, which may have been edited.
        extensions: the initialiser and the variant that it was created with.
        config: that of the tensors.
        modules: path → the layer there.

    Raises:
        ConfigError: they belong to another base, or freeze A or B where the adapter trains them.
    """
    ours, theirs = initializer_of(present), initializer_of(config)
    shifted = bool(shifts_of_start(adapter, modules))
    if theirs.needs_base:
        edited = not ours.needs_base and all(getattr(present, name) == getattr(config, name) for name in INITIALIZER_SETTINGS)
        fits = shifted and edited and type(theirs) in extensions
    else:
        fits = ours.frozen == theirs.frozen
    if not fits:
        raise ConfigError(
            f"the adapter {adapter!r} exists with another start than the file's: init_lora_weights={config.init_lora_weights!r} instead of "
            f"{present.init_lora_weights!r}, one of which changes the base or freezes A or B",
            hint="load it under another name, or delete_adapter the existing one first",
            code="other-config",
        )
    if shifted and not theirs.needs_base:
        warnings.warn(
            f"the adapter {adapter!r} changed the base when it was created (init_lora_weights={present.init_lora_weights!r}); the tensors with "
            f"init_lora_weights={config.init_lora_weights!r} are taken for its own, for the changed base",
            PeftWarning,
            stacklevel=5,
        )
