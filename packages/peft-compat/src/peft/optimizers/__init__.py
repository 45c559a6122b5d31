"""Names of `peft.optimizers`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer
    """,
)
