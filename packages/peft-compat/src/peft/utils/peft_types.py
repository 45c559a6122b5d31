"""Names of `peft.utils.peft_types`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core: PeftType TaskType
    peft._mappings: register_peft_method
    """,
)
