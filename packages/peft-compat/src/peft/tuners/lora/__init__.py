"""Names of `peft.tuners.lora`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._training: create_arrow_model
    peft_lora: ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
    peft_lora: MontecloraConfig VeloraConfig convert_to_lora get_eva_state_dict initialize_lora_eva_weights preprocess_loraga
    peft_lora: save_as_lora
    peft._layers: Conv1d Conv2d Conv3d Embedding Linear LoraLayer MultiheadAttention ParamWrapper
    peft._tuner_models: LoraModel
    peft.tuners.lora.bnb: Linear8bitLt Linear4bit
    peft.tuners.lora.layer: layer=*
    peft.tuners.lora.awq: awq=*
    peft.tuners.lora.bnb: bnb=*
    peft.tuners.lora.dora: dora=*
    peft.tuners.lora.gptq: gptq=*
    peft.tuners.lora.variants: variants=*
    peft.tuners.lora.model: model=*
    peft.tuners.lora.config: config=*
    """,
)
