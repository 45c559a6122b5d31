"""Initial values of virtual tokens: random numbers, or word embeddings of the base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, ConfigError

from .config import PromptTuningConfig


@dataclass(frozen=True)
class Vocabulary:
    """The token embeddings of a base.

    Args:
        embed: the module that turns ids into embeddings.
        special: ids of the special tokens that the base's config names: padding, begin, end, ….
    """

    embed: nn.Module
    special: frozenset[int]

    @classmethod
    def of(cls, base: BaseView) -> Vocabulary:
        """Return the vocabulary of a base."""
        config = base.text_config
        found: set[int] = set()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id", "mask_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
        return cls(base.embeddings, frozenset(found))

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the embeddings (…, hidden) of ids (…), float32 on the CPU, including any scaling in the module's forward."""
        with torch.no_grad():
            found: Tensor = self.embed(ids.to(next(self.embed.parameters()).device))
        return found.detach().float().cpu().clone()

    @property
    def count(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self.embed.num_embeddings)  # type: ignore[arg-type]

    def std(self) -> float:
        """Return the standard deviation of all embeddings."""
        weight: Tensor = self.embed.weight  # type: ignore[assignment]
        scale = getattr(self.embed, "embed_scale", 1.0)
        return float(weight.detach().float().std()) * float(scale)


def initial_table(table: Tensor, config: PromptTuningConfig, vocabulary: Vocabulary | None) -> Tensor:
    """Return the initial values of a prompt (tokens, hidden).

    Args:
        table: uninitialised, (tokens, hidden); overwritten.
        config: selects the initialisation.
        vocabulary: the base's vocabulary; None: draw from N(0, 1).

    Raises:
        ConfigError: the initial text has no tokens, or the vocabulary has fewer non-special tokens than `distinct_words` needs.
    """
    table.normal_()
    if vocabulary is None:
        return table
    if config.prompt_tuning_init == "RANDOM":
        return table.mul_(vocabulary.std())
    ids = _distinct(len(table), vocabulary) if config.distinct_words else _ids(config, len(table), vocabulary)
    return vocabulary(ids)


def needs_vocabulary(config: PromptTuningConfig) -> bool:
    """Return whether the initial values depend on the base's vocabulary."""
    if config.prompt_tuning_init == "RANDOM":
        return config.random_scale == "words"
    return config.prompt_tuning_init in ("SAMPLE_VOCAB", "TEXT")


def _ids(config: PromptTuningConfig, count: int, vocabulary: Vocabulary) -> Tensor:
    """Return the ids (count,) of the tokens whose embeddings are a prompt's initial values."""
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return torch.randint(0, vocabulary.count, (count,))
    from transformers import AutoTokenizer

    options: dict[str, Any] = dict(config.tokenizer_kwargs or {})
    options.pop("trust_remote_code", None)  # a config file must not make us run code
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens", hint="write some text")
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])


def _distinct(count: int, vocabulary: Vocabulary) -> Tensor:
    usual = torch.tensor([token for token in range(vocabulary.count) if token not in vocabulary.special])
    if len(usual) < count:
        raise ConfigError(
            f"distinct_words: the base has {len(usual)} tokens that are not special, but the prompt needs {count}", hint="use a shorter prompt"
        )
    return usual[torch.randperm(len(usual))[:count]]
