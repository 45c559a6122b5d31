"""Names of `peft.tuners.lora.torchao`: layers of LoRA around those of torchao, for `isinstance`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora.tools.kinds: TorchaoLoraLinear
    """,
)
