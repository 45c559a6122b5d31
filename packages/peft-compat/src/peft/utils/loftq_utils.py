"""Names of `peft.utils.loftq_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: replace_lora_weights_loftq
    """,
)
