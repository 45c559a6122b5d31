"""Names of `peft.utils.other`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._constants: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS CONFIG_NAME EMBEDDING_LAYER_NAMES
    peft._constants: SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES WEIGHTS_NAME
    peft_core: AuxiliaryTrainingWrapper ModulesToSaveWrapper cast_mixed_precision_params fsdp_auto_wrap_policy prepare_model_for_kbit_training
    peft._helpers: bloom_model_postprocess_past_key_value infer_device shift_tokens_right transpose
    peft._sub_modules: get_pattern_key get_quantization_config _get_submodules=get_submodules
    peft_core.layers.token_rows: TrainableTokensWrapper=TokenRows
    peft._inspecting: set_additional_trainable_modules
    """,
)
