"""What LoRA does to a model."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from peft_core import BaseView, LayerTuner, ModuleValues, PeftWarning, Plan
from peft_core.layers.base_ops import is_conv1d

from .config import LoraConfig
from .layer import Embedding, Linear, LoraSettings


class LoraTuner(LayerTuner):
    """Wraps the targeted layers, each with its own rank and alpha."""

    layers = (Linear, Embedding)

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan as every layer tuner; the config's `fan_in_fan_out` becomes what the layers are."""
        plan = super().plan(base, adapter, config)
        return dataclasses.replace(plan, resolved={**plan.resolved, "fan_in_fan_out": self._fan_in_fan_out(base, plan, config)})

    def settings(self, config: LoraConfig, module: ModuleValues) -> LoraSettings:
        """Return rank, alpha and the rest for one module."""
        return LoraSettings(
            r=module.rank(config.r),
            alpha=module.alpha(config.lora_alpha),
            dropout=float(config.lora_dropout),
            rslora=config.use_rslora,
            init=config.init_lora_weights,
        )

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
