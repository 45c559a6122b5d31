"""Configs of the prompt methods. Imports no torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_core.config import PromptLearningConfig, require_positive_integer
from peft_core.errors import ConfigError, did_you_mean


class PromptTuningInit(str, enum.Enum):
    """How a prompt starts: random numbers, embeddings of random tokens, or those of a text."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: a learned table of embeddings before the input.

    Besides the fields of `PromptLearningConfig`:

    Args:
        prompt_tuning_init: ``"RANDOM"`` (normal, std 1), ``"SAMPLE_VOCAB"`` (embeddings of random tokens), ``"TEXT"``.
        prompt_tuning_init_text: the text, with TEXT.
        tokenizer_name_or_path: its tokenizer, with TEXT.
        tokenizer_kwargs: options for loading it; only with TEXT.

    Raises:
        ConfigError: a bad value, or one that is missing.

    Source: arXiv 2104.08691.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    default_peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def check(self) -> None:
        """Check every value by itself."""
        super().check()
        _check_length(self)
        names = [init.value for init in PromptTuningInit]
        given = self.prompt_tuning_init.value if isinstance(self.prompt_tuning_init, enum.Enum) else str(self.prompt_tuning_init)
        if given not in names:
            raise ConfigError(f"prompt_tuning_init={given!r} is unknown", hint=did_you_mean(given, names) or f"write one of {names}")
        self.prompt_tuning_init = PromptTuningInit(given)
        if given == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}")
        elif self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: learned keys and values before those of every layer.

    Besides the fields of `PromptLearningConfig`:

    Args:
        init_weights: None: normal, std 1; ``"zero"``: keys and values are zero at first.
        encoder_hidden_size: hidden width of the projection; None: `token_dim`.
        prefix_projection: compute keys and values from a smaller table by a two-layer network.

    Raises:
        ConfigError: a bad value.

    Source: arXiv 2101.00190.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    default_peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    def check(self) -> None:
        """Check every value by itself."""
        super().check()
        _check_length(self)
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights={self.init_weights!r} is unknown", hint="write None or 'zero'")
        if self.encoder_hidden_size is not None:
            require_positive_integer("encoder_hidden_size", self.encoder_hidden_size)


def _check_length(config: PromptLearningConfig) -> None:
    if config.num_virtual_tokens is not None:
        require_positive_integer("num_virtual_tokens", config.num_virtual_tokens)
