"""Names of `peft.tuners.adalora.layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    "",
    absent="AdaLoraLayer RankAllocator",
)
