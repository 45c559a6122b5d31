"""The module `peft` on top of peft-core. Each name is imported from our packages when it is first used; importing `peft` does not import torch."""

from __future__ import annotations

from . import _absent, _conflict
from ._names import names

_conflict.check()

__version__ = "0.21.2"

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._lenient: AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    peft._lenient: AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
    peft._lenient: MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction
    peft._lenient: PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
    peft._lenient: get_peft_model inject_adapter_in_model
    peft_core: NoMatchingPeftModuleError PeftConfig PeftError PeftType PeftWarning PromptLearningConfig TaskType cast_mixed_precision_params
    peft_core: get_base_model_state_dict get_layer_status get_model_status get_peft_config get_peft_model_state_dict
    peft_core: load_peft_weights prepare_model_for_kbit_training set_base_model_state_dict set_peft_model_state_dict MixedModel=TunerModel
    peft._mappings: PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
    peft._mappings: TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    peft._helpers: bloom_model_postprocess_past_key_value shift_tokens_right
    peft_prompt: CPTConfig CPTEmbedding MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit PrefixEncoder
    peft_prompt: PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptTuningConfig
    peft_prompt: PromptTuningInit
    peft._training: create_arrow_model
    peft_lora: ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig
    peft_lora: VeloraConfig convert_to_lora find_kappa_target_modules get_eva_state_dict initialize_lora_eva_weights
    peft_lora: preprocess_loraga replace_lora_weights_loftq save_as_lora
    peft_loha: LoHaConfig
    peft._tuner_models: LoHaModel LoraModel TrainableTokensModel
    peft_tokens: TrainableTokensConfig
    peft.auto: auto=*
    peft.config: config=*
    peft.functional: functional=*
    peft.helpers: helpers=*
    peft.import_utils: import_utils=*
    peft.mapping: mapping=*
    peft.mapping_func: mapping_func=*
    peft.mixed_model: mixed_model=*
    peft.optimizers: optimizers=*
    peft.peft_model: peft_model=*
    peft.tuners: tuners=*
    peft.utils: utils=*
    """,
    absent=_absent.NAMES,
)
