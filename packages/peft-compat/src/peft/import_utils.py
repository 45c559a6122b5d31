"""Names of `peft.import_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._libraries: is_bnb_4bit_available is_bnb_available
    peft._libraries: is_aqlm_available is_diffusers_available is_eetq_available is_gptqmodel_available is_hqq_available is_inc_available
    peft._libraries: is_optimum_available is_te_available is_torchao_available is_xpu_available
    """,
)
