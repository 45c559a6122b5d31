"""Names of `peft.tuners.ia3`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft.tuners.ia3.layer: layer=*
    """,
    absent="IA3Config IA3Model IA3Layer",
)
