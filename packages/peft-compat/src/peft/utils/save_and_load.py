"""Names of `peft.utils.save_and_load`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core: get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict set_peft_model_state_dict
    peft._parallel: _maybe_shard_state_dict_for_tp
    peft._inspecting: get_embedding_layer_name has_valid_embedding_base_layer
    """,
)
