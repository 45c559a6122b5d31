"""Names of `peft.utils.other`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core.checkpoint.names: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    peft_core: AuxiliaryTrainingWrapper ModulesToSaveWrapper bloom_model_postprocess_past_key_value cast_mixed_precision_params fsdp_auto_wrap_policy
    peft_core: get_pattern_key get_quantization_config infer_device prepare_model_for_kbit_training shift_tokens_right transpose
    peft_core.models.sub_modules: _get_submodules=get_submodules
    peft_core.checkpoint.names: CONFIG_NAME EMBEDDING_LAYER_NAMES SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES WEIGHTS_NAME
    peft_core.layers.token_rows: TrainableTokensWrapper=TokenRows
    """,
)
