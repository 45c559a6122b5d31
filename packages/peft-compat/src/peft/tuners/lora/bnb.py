"""Names of `peft.tuners.lora.bnb`: layers of LoRA around those of bitsandbytes, for `isinstance`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora.tools.kinds: Linear4bit Linear8bitLt
    peft._dispatch: dispatch_bnb_4bit dispatch_bnb_8bit
    """,
)
