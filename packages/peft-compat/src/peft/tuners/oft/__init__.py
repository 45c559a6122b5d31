"""Names of `peft.tuners.oft`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft.tuners.oft.layer: layer=*
    """,
    absent="OFTConfig OFTModel OFTLayer",
)
