"""Names of `peft.peft_model`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._lenient: PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
    peft._lenient: PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
    peft_core: PeftConfig TunerLayerStatus TunerModelStatus get_layer_status get_model_status
    peft_core: PeftType TaskType get_peft_model_state_dict set_peft_model_state_dict load_peft_weights
    peft._mappings: PEFT_TYPE_TO_TUNER_MAPPING
    """,
)
