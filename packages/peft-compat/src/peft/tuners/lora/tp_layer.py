"""Names of `peft.tuners.lora.tp_layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora.tools.kinds: LoraParallelLinear
    """,
)
