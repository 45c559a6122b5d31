"""Loading tensors into an existing adapter with another initialisation: checks that both are made for the same base weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from peft_core import ConfigError, Merge, PeftWarning

from ..config import INITIALIZER_SETTINGS, LoraConfig
from ..contracts import Extension
from ..extensions import initializer_of

#: config fields that affect only the initial values of A and B
START_FIELDS = frozenset({"init_lora_weights", *INITIALIZER_SETTINGS})


def shifts_of_start(adapter: str, modules: Mapping[str, Any]) -> dict[str, Merge]:
    """Return the changes that the initialisation of an adapter subtracted from base weights: path of the layer → the change.

    Changes that a variant subtracts (KaSA) are not included: the variant computes them again from the weights of every base.

    Args:
        adapter: name of the adapter.
        modules: path → the layer at that path.
    """
    found = {}
    for path, layer in modules.items():
        merging, variant = getattr(layer, "merging", None), getattr(layer, "variants", {}).get(adapter)
        if merging is not None and adapter in merging.shifts and not (variant is not None and variant.shifts_base):
            found[path] = merging.shifts[adapter]
    return found


def check_start(adapter: str, present: LoraConfig, extensions: Collection[type[Extension]], config: LoraConfig, modules: Mapping[str, Any]) -> None:
    """Check that tensors can be loaded into an existing adapter although their config has another initialisation.

    Tensors whose initialisation does not change the base weights can be loaded. If the existing adapter has changed its base weights, a warning
    says that the tensors are treated as trained on the changed weights: as the adapter's own tensors, saved with an edited config.
    Tensors whose initialisation changed the base weights need an existing adapter that was initialised in the same way.

    Args:
        adapter: name of the existing adapter.
        present: config of the existing adapter; it may have been edited after the adapter was created.
        extensions: the initialiser and the variant with which the adapter was created.
        config: the config that belongs to the tensors.
        modules: path → the layer at that path.

    Raises:
        ConfigError: the tensors belong to other base weights, or their config freezes A or B where the adapter trains it.
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
            f"the adapter {adapter!r} was initialised in another way than the file's: init_lora_weights={config.init_lora_weights!r} instead of "
            f"{present.init_lora_weights!r}, and one of the two changes the base weights or freezes A or B",
            hint="load it under another name, or delete_adapter the existing one first",
            code="other-config",
        )
    if shifted and not theirs.needs_base:
        warnings.warn(
            f"the initialisation of {adapter!r} changed the base weights (init_lora_weights={present.init_lora_weights!r}); the tensors, with "
            f"init_lora_weights={config.init_lora_weights!r}, are assumed to be trained on the changed weights",
            PeftWarning,
            stacklevel=5,
        )
