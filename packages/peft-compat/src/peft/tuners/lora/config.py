"""Names of `peft.tuners.lora.config`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig
    peft_lora: VeloraConfig
    """,
)
