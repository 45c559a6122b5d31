"""The base with LoHa adapters, as code written for other frameworks names it."""

from __future__ import annotations

from peft_core import MethodModel


class LoHaModel(MethodModel):
    """A base with LoHa adapters and no further wrapper; see `peft_core.MethodModel`.

    Example:
        >>> model = LoHaModel(base, LoHaConfig(target_modules=["q_proj"]), "default")
    """

    peft_type = "LOHA"
