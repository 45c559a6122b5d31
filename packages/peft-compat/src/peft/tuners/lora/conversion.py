"""Names of `peft.tuners.lora.conversion`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: convert_to_lora save_as_lora
    """,
)
