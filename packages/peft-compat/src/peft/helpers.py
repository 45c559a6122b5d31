"""Names of `peft.helpers`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._signatures: check_if_peft_model update_forward_signature update_generate_signature update_signature
    peft._training: KappaTuneSelector MontecloraTrainerMixin
    peft_lora: DoraCaching disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale
    """,
)
