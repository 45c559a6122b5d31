"""Names of `peft.tuners.trainable_tokens`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._tuner_models: TrainableTokensModel
    peft_tokens: TrainableTokensConfig TrainableTokensLayer
    """,
)
