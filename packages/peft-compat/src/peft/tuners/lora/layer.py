"""Names of `peft.tuners.lora.layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._layers: Conv1d Conv2d Conv3d Embedding Linear LoraLayer MultiheadAttention ParamWrapper
    peft._layers: BaseTunerLayer
    peft._constants: ALLOWED_COMPUTE_DTYPES VARIANT_KWARG_KEYS
    peft._helpers: transpose
    peft._sub_modules: check_adapters_to_merge
    peft._dispatch: dispatch_default
    peft_lora.tools.kinds: _LoraParameterProxy=ParameterProxy
    """,
)
