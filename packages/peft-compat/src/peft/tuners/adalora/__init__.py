"""Names of `peft.tuners.adalora`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._layers: BaseTunerLayer
    peft.tuners.adalora.model: model=*
    peft.tuners.adalora.layer: layer=*
    peft.tuners.adalora.config: config=*
    """,
    absent="AdaLoraConfig AdaLoraModel AdaLoraLayer RankAllocator",
)
