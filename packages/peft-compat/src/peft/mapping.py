"""Names of `peft.mapping`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._lenient: MODEL_TYPE_TO_PEFT_MODEL_MAPPING get_peft_model inject_adapter_in_model
    peft._mappings: PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING
    peft_core: get_peft_config
    """,
)
