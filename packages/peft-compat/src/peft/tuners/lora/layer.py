"""Names of `peft.tuners.lora.layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_lora: Conv1d=Convolution Conv2d=Convolution Conv3d=Convolution Embedding Linear LoraLayer MultiheadAttention=Attention ParamWrapper=Parameter
    peft_core: BaseTunerLayer
    peft_lora.tools.kinds: _LoraParameterProxy=ParameterProxy
    """,
)
