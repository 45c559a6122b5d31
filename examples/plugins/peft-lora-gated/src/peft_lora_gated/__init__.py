"""Gated LoRA for peft-lora: `LoraConfig(variant="gated", plugin_settings={"gated": GateSettings(...)})`."""

from __future__ import annotations

from .settings import GateSettings

__version__ = "0.1.0"
__all__ = ["GateSettings", "__version__"]
