"""Gated LoRA: y = base(x) + t·g·s·B(A·drop(x)), where g trains and t can be said in a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft_core import Call, ConfigError
from peft_lora import LoraConfig, LoraLayer, LowRank, Variant
from torch import Tensor, nn

from .settings import GateSettings

#: the keyword of a call, and the name under which layers find its value
STRENGTH = "gate_strength"


class Gated(LowRank):
    """Shapes: `lora_gate` g (1,)."""

    name = "gated LoRA"
    containers = ("lora_gate",)

    @classmethod
    def prepare(cls, call: Call, configs: Mapping[str, LoraConfig]) -> Call:
        """Tell the layers the strength that the caller gave."""
        return call.telling(**{STRENGTH: float(call.arguments.get(STRENGTH, 1.0))})

    @classmethod
    def refuse_mixture(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """Check that all adapters of a model are gated, so that one strength means the same to all.

        Raises:
            ConfigError: some are not.
        """
        for name, other in others.items():
            if (other.variant == "gated") != (config.variant == "gated"):
                raise ConfigError(f"either all adapters of a model are gated or none is: {name!r} differs", hint="use two models")

    @property
    def gate(self) -> Tensor:
        """The gate g (1,)."""
        found: Tensor = self.layer.lora_gate[self.adapter]
        return found

    def add(self) -> None:
        """Create g as the settings say."""
        self.layer.new("lora_gate", self.adapter, (1,), init=lambda tensor: tensor.fill_(settings_of(self).start))

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and g·B (out, r)."""
        a, b = super().pair()
        return a, b * self.gate

    def between(self, hidden: Tensor) -> Tensor:
        """Return g·A·x."""
        found: Tensor = hidden * self.gate.to(hidden.dtype)
        return found

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + t·(g·s·B(A·drop(x)))."""
        strength: float = self.layer.selection.current().context.get(STRENGTH, 1.0)
        if strength == 1.0:
            return super().contribute(x, y)
        return y + strength * super().contribute(x, torch.zeros_like(y))


def settings_of(variant: Variant) -> GateSettings:
    """Return the settings of the adapter of a variant."""
    settings: Any = variant.settings.config.plugin_settings
    found: GateSettings = settings["gated"]
    return found


def gate_penalty(model: nn.Module) -> Tensor:
    """Return Σ penalty · g² over all layers and gated adapters: a scalar to add to the loss."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    variants = [variant for layer in layers for variant in layer.variants.values() if isinstance(variant, Gated)]
    found = [settings_of(variant).penalty * variant.gate.float().square().sum() for variant in variants]
    return torch.stack(found).sum() if found else torch.zeros(())
