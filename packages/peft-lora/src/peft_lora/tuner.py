"""What LoRA does to a model."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from peft_core import BaseView, LayerTuner, ModuleValues, PeftWarning, Plan, is_conv1d, ops_for

from .config import LoraConfig
from .extensions import initializer_of, variant_of
from .initializers.base import Initializer
from .layers.common import LoraSettings
from .layers.convolution import Convolution
from .layers.embedding import Embedding
from .layers.linear import Linear
from .variants.base import Variant


class LoraTuner(LayerTuner):
    """Wraps the targeted layers, each with its own rank and alpha."""

    layers = (Linear, Embedding, Convolution)

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan as every layer tuner; the config's `fan_in_fan_out` becomes what the layers are.

        Raises:
            ConfigError: the initialisation or the variant does not work on a module; and as every layer tuner.
        """
        self._chosen = initializer_of(config), variant_of(config)
        plan = super().plan(base, adapter, config)
        initializer, variant = self._chosen
        for wrap in plan.wraps:
            kind = kind_of(base.modules[wrap.path])
            initializer.require_kind(kind, wrap.path)
            if variant is not None:
                variant.require_kind(kind, wrap.path)
        return dataclasses.replace(plan, resolved={**plan.resolved, "fan_in_fan_out": self._fan_in_fan_out(base, plan, config)})

    def settings(self, config: LoraConfig, module: ModuleValues) -> LoraSettings:
        """Return rank, alpha and the rest for one module."""
        initializer, variant = self._chosen
        return LoraSettings(module.path, module.rank(config.r), module.alpha(config.lora_alpha), config, initializer, variant)

    _chosen: tuple[Initializer, type[Variant] | None]

    def _fan_in_fan_out(self, base: BaseView, plan: Plan, config: LoraConfig) -> bool:
        kinds = {is_conv1d(base.modules[wrap.path]) for wrap in plan.wraps}
        if len(kinds) != 1 or config.fan_in_fan_out in kinds:
            return config.fan_in_fan_out
        actual = kinds.pop()
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target modules are {'Conv1D' if actual else 'Linear'} layers. "
            f"Setting fan_in_fan_out to {actual}.",
            PeftWarning,
            stacklevel=6,
        )
        return actual


def kind_of(module: nn.Module) -> str:
    """Return the kind of a base layer, as initialisers and variants name it."""
    ops = ops_for(module)
    return ops.kind if ops is not None else "other"
