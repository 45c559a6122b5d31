"""Names of `peft.tuners.lora.awq`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._outside: AwqLoraLinear
    """,
)
