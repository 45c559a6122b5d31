"""Names of `peft.utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core.checkpoint.names: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS
    peft_core: AuxiliaryTrainingWrapper ModulesToSaveWrapper PeftType TaskType bloom_model_postprocess_past_key_value cast_mixed_precision_params
    peft_core: get_peft_model_state_dict infer_device load_peft_weights prepare_model_for_kbit_training set_peft_model_state_dict shift_tokens_right
    peft_core: transpose register_peft_method fsdp_auto_wrap_policy get_quantization_config
    peft_core: TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    peft_core.models.sub_modules: _get_submodules=get_submodules
    peft_core.checkpoint.names: CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME
    peft_core.layers.token_rows: TrainableTokensWrapper=TokenRows
    peft_lora: replace_lora_weights_loftq
    peft.utils.constants: constants=*
    peft.utils.hotswap: hotswap=*
    peft.utils.integrations: integrations=*
    peft.utils.other: other=*
    peft.utils.save_and_load: save_and_load=*
    peft.utils.transformers_weight_conversion: transformers_weight_conversion=*
    """,
)
