"""Names of `peft.utils.hotswap`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core: hotswap_adapter hotswap_adapter_from_state_dict
    peft_lora: check_hotswap_configs_compatible prepare_model_for_compiled_hotswap
    """,
)
