"""Names of `peft.tuners.oft.layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    "",
    absent="OFTLayer",
)
