"""Conversions with which transformers' own loader writes adapters into a model that is not wrapped."""

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
    """Return what turns the names of an adapter's file into those of a model that it was injected into.

    Args:
        weight_conversions: transformers' conversions for the base's own weights; None: the answer is empty.
        adapter_name: the adapter's name.
        peft_config: its config; None: names of all installed methods are known.

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
    """Rewrite a config in place that was made for another layout of the base, as injecting it would.

    Args:
        peft_config: the config.
        model: the base.
        conversions: transformers' conversions for the base's weights; None or none: there is nothing to do.

    Raises:
        ConfigError: it names only a part of what is one parameter now.
    """
    if not conversions:
        return
    spec = registry.resolve(str(peft_config.peft_type))
    tuner = registry.tuner_class(spec.peft_type)(spec, AdapterSelection())
    for name, value in tuner.adapted_config(BaseView(model), copy.copy(peft_config)).items():
        setattr(peft_config, name, value)
