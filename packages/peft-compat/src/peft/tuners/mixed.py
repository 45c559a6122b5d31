"""Names of `peft.tuners.mixed`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_core: MixedModel=TunerModel
    peft._mappings: COMPATIBLE_TUNER_TYPES
    """,
)
