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
    peft_lora: Conv1d=Convolution Conv2d=Convolution Conv3d=Convolution Embedding Linear LoraLayer MultiheadAttention=Attention ParamWrapper=Parameter
    peft._tuner_models: LoraModel
    peft.tuners.lora.bnb: Linear8bitLt Linear4bit
    peft.tuners.lora.layer: layer=*
    peft.tuners.lora.model: model=*
    peft.tuners.lora.config: config=*
    """,
)
