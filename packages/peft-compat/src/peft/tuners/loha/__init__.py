"""Names of `peft.tuners.loha`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._tuner_models: LoHaModel
    peft_loha: LoHaConfig LoHaLayer Linear Conv2d=Convolution Conv1d=Convolution
    peft.tuners.loha.layer: layer=*
    """,
)
