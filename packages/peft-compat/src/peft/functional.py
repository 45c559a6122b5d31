"""Names of `peft.functional`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._lenient: inject_adapter_in_model
    peft_core: cast_adapter_dtype delete_adapter get_peft_model_state_dict load_peft_weights set_adapter
    peft_core: set_peft_model_state_dict set_requires_grad
    """,
)
