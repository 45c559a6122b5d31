"""Names of `peft.tuners.lora.dora`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._outside: DoraEmbeddingLayer DoraLinearLayer
    peft_lora.tools.kinds: dequantize_module_weight
    peft._helpers: transpose
    """,
)
