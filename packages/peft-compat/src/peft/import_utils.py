"""Names of `peft.import_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core.models.libraries: is_bnb_available is_bnb_4bit_available is_torchao_available is_hqq_available is_optimum_quanto_available
    peft_core.models.libraries: is_gptqmodel_available is_auto_awq_available is_aqlm_available is_eetq_available
    peft_core.models.libraries: is_accelerate_available is_diffusers_available
    """,
)
