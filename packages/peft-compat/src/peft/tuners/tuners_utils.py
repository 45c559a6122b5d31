"""Names of `peft.tuners.tuners_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._tuner_models: BaseTuner
    peft_core: BaseTunerLayer
    peft._sub_modules: check_adapters_to_merge onload_layer check_target_module_exists _maybe_include_all_linear_layers=include_all_linear
    """,
)
