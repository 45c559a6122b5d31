"""Names of `peft.utils.transformers_weight_conversion`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._weight_mapping: build_peft_weight_mapping convert_peft_config_for_transformers
    transformers.conversion_mapping: get_model_conversion_mapping
    """,
)
