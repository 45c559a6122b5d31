"""The base with LoRA adapters, as code written for other frameworks names it."""

from __future__ import annotations

from peft_core import MethodModel


class LoraModel(MethodModel):
    """A base with LoRA adapters and no further wrapper; see `peft_core.MethodModel`.

    Example:
        >>> model = LoraModel(base, LoraConfig(target_modules=["q_proj"]), "default")
    """

    peft_type = "LORA"
