"""Names of `peft.tuners`."""

from __future__ import annotations

from peft import _absent
from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._training: create_arrow_model
    peft_lora: ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig
    peft_lora: VeloraConfig convert_to_lora get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora
    peft_loha: LoHaConfig
    peft._tuner_models: LoHaModel LoraModel TrainableTokensModel
    peft_prompt: CPTConfig CPTEmbedding MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit PrefixEncoder
    peft_prompt: PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptTuningConfig
    peft_prompt: PromptTuningInit
    peft_tokens: TrainableTokensConfig
    peft_core: MixedModel=TunerModel
    peft.tuners.adalora: adalora=*
    peft.tuners.adaption_prompt: adaption_prompt=*
    peft.tuners.ia3: ia3=*
    peft.tuners.oft: oft=*
    peft.tuners.lycoris_utils: lycoris_utils=*
    peft.tuners.loha: loha=*
    peft.tuners.lokr: lokr=*
    peft.tuners.lora: lora=*
    peft.tuners.tuners_utils: tuners_utils=*
    """,
    absent=_absent.NAMES,
)
