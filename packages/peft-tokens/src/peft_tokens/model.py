"""The base with trained rows, as code written for other frameworks names it."""

from __future__ import annotations

from peft_core import MethodModel


class TrainableTokensModel(MethodModel):
    """A base with trained rows of embeddings and no further wrapper; see `peft_core.MethodModel`.

    Example:
        >>> model = TrainableTokensModel(base, TrainableTokensConfig(token_indices=[1, 2]), "default")
    """

    peft_type = "TRAINABLE_TOKENS"
