"""Names of `peft.utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._constants: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME
    peft_core: AuxiliaryTrainingWrapper ModulesToSaveWrapper PeftType TaskType cast_mixed_precision_params get_peft_model_state_dict load_peft_weights
    peft_core: prepare_model_for_kbit_training set_peft_model_state_dict fsdp_auto_wrap_policy NoMatchingPeftModuleError PeftError PeftWarning
    peft_core: get_base_model_state_dict set_base_model_state_dict
    peft._helpers: bloom_model_postprocess_past_key_value infer_device shift_tokens_right transpose
    peft._mappings: register_peft_method TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    peft._sub_modules: get_quantization_config _get_submodules=get_submodules
    peft_core.layers.token_rows: TrainableTokensWrapper=TokenRows
    peft_lora: replace_lora_weights_loftq
    peft.utils.constants: constants=*
    peft.utils.hotswap: hotswap=*
    peft.utils.integrations: integrations=*
    peft.utils.other: other=*
    peft.utils.save_and_load: save_and_load=*
    peft.utils.transformers_weight_conversion: transformers_weight_conversion=*
    peft._constants: UPCAST_DTYPES TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    peft._constants: TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    peft.utils.merge_utils: merge_utils=*
    """,
)
