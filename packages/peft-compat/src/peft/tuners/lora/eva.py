"""Names of `peft.tuners.lora.eva`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: get_eva_state_dict initialize_lora_eva_weights
    """,
)
