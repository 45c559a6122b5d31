"""Names of `peft.tuners.lokr`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft.tuners.lokr.layer: layer=*
    """,
    absent="LoKrConfig LoKrModel LoKrLayer",
)
