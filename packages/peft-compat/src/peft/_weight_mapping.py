"""Weight conversions that transformers' loader uses to load an adapter into a model with injected adapters (without a `PeftModel`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_core.base.view import BaseView
from peft_core.config import PeftConfig
from peft_core.plugins.registry import registry
from peft_core.selection.selection import AdapterSelection
from peft_core.tensor_names import WRAPPER_PREFIX


def build_peft_weight_mapping(weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None) -> list[Any]:
    """Return the conversions from tensor names in an adapter's file to parameter names in a model with the injected adapter.

    Args:
        weight_conversions: transformers' conversions for the weights of the base; if None, the returned list is empty.
        adapter_name: the adapter's name.
        peft_config: the adapter's config; None: the list contains the renamings of all installed methods.

    Returns:
        transformers' `WeightRenaming` and `WeightConverter` objects, in the order in which they are applied.

    Raises:
        UnknownTunerError: the config's method is not installed.
    """
    if weight_conversions is None:
        return []
    from transformers.core_model_loading import WeightRenaming

    names = registry.names() if peft_config is None else [str(peft_config.peft_type)]
    found = [WeightRenaming(f"{WRAPPER_PREFIX}model.", "model."), WeightRenaming(WRAPPER_PREFIX, "")]
    known: dict[tuple[str, str], None] = {}
    for name in names:
        tuner: Any = registry.tuner_class(name)
        known.update(dict.fromkeys(tuner.loading_rules(registry.resolve(name), adapter_name)))
    found += [WeightRenaming(expression, replacement) for expression, replacement in known]
    if peft_config is None:
        return [*found, *weight_conversions]
    return [*found, *tuner.loading_conversions(weight_conversions, adapter_name, peft_config)]


def convert_peft_config_for_transformers(peft_config: PeftConfig, model: nn.Module, conversions: Sequence[Any] | None) -> None:
    """Adapt a config, in place, that was made for another weight layout of the base; injection makes the same changes.

    Args:
        peft_config: the config to change.
        model: the base model.
        conversions: transformers' conversions for the weights of the base; if None or empty, nothing is changed.

    Raises:
        ConfigError: the config names only some of the modules whose weights are one parameter in the new layout.
    """
    if not conversions:
        return
    spec = registry.resolve(str(peft_config.peft_type))
    tuner = registry.tuner_class(spec.peft_type)(spec, AdapterSelection())
    for name, value in tuner.adapted_config(BaseView(model), copy.copy(peft_config)).items():
        setattr(peft_config, name, value)
