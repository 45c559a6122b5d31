"""Names of `peft.tuners.loha.layer`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft_loha: LoHaLayer Linear Conv2d=Convolution Conv1d=Convolution
    """,
)
