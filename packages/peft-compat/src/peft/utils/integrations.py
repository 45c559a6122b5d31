"""Names of `peft.utils.integrations`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._libraries: gather_params_ctx init_empty_weights
    peft._sub_modules: get_bnb_param_type
    peft_lora.tools.kinds: dequantize_module_weight
    peft._dispatch: dequantize_bnb_weight
    """,
)
