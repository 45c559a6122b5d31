"""The config of trainable tokens. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft_core import ConfigError, PeftConfig


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Which rows of which embedding train; the rest of the table stays frozen.

    Args:
        token_indices: ids of the tokens; negative ones count from the end.
        target_modules: name(s) of the embedding: each matches modules whose path is this name or ends in ``.name``; or one regular expression for
            the full path; None: the input embeddings of the model.
        init_weights: True: initialise the rows with those of the base; False: with normal random numbers.

    Raises:
        ConfigError: a value has a wrong type.

    Example:
        >>> config = TrainableTokensConfig(token_indices=[32000, 32001], task_type="CAUSAL_LM")
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    default_peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"

    def check(self) -> None:
        """Check the types of the values."""
        super().check()
        indices = self.token_indices
        if isinstance(indices, (str, bytes)) or not isinstance(indices, Sequence) or not all(type(index) is int for index in indices):
            raise ConfigError(f"token_indices={indices!r} is no list of integers", hint="write the ids of tokens: [32000, 32001]")
        targets = self.target_modules
        if targets is not None and not isinstance(targets, (str, list, tuple, set, frozenset)):
            raise ConfigError(f"target_modules={targets!r} is a {type(targets).__name__}", hint="give names, or one regular expression")
        if not isinstance(self.init_weights, bool):
            raise ConfigError(f"init_weights={self.init_weights!r} is neither True nor False")
