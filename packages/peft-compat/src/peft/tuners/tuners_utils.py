"""Names of `peft.tuners.tuners_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._tuner_models: BaseTuner
    peft._layers: BaseTunerLayer
    peft_core: cast_adapter_dtype
    peft._constants: UPCAST_DTYPES
    peft._sub_modules: check_adapters_to_merge onload_layer check_target_module_exists _get_submodules=get_submodules
    peft._sub_modules: _maybe_include_all_linear_layers=include_all_linear
    peft._inspecting: _ExcludedModule _check_lora_target_modules_mamba _get_tuner_state_dict_key_prefixes inspect_matched_modules
    """,
)
