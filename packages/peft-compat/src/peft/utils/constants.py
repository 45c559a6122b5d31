"""Names of `peft.utils.constants`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._constants: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS CONFIG_NAME DUMMY_TARGET_MODULES
    peft._constants: EMBEDDING_LAYER_NAMES SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES WEIGHTS_NAME
    peft._mappings: TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    peft._helpers: bloom_model_postprocess_past_key_value
    peft._constants: UPCAST_DTYPES TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    peft._constants: TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    """,
)
