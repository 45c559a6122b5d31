"""Prompt tuning. Source: arXiv 2104.08691."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, InitOptions, Plan, Slot, TunerBase, VirtualTokens

from . import dimensions
from .config import PromptTuningConfig
from .encoders import INITIAL, Encoder
from .tensor_names import TABLE
from .words import Words, needs_words, starting_table


class PromptEmbedding(Encoder):
    """The table of a prompt: `embedding.weight` (tokens, hidden) in float32.

    Args:
        config: how it starts.
        size: (tokens, hidden); on encoder-decoder models twice as many tokens as the prompt has, of which the first half acts. None: as the
            config says; a module in this place stands for the vocabulary.
        words: the base's vocabulary, for starting values; None: the config needs none.
        init_options: whether starting values are needed.
    """

    def __init__(
        self,
        config: PromptTuningConfig,
        size: tuple[int, int] | nn.Module | None = None,
        words: Words | None = None,
        init_options: InitOptions = INITIAL,
    ) -> None:
        super().__init__()
        if not isinstance(size, tuple):
            words = Words(size, frozenset()) if size is not None else words
            size = dimensions.size(config, dimensions.of_config(config))
        self.count = int(config.num_virtual_tokens or 0)
        table = torch.empty(size, device="meta" if init_options.meta else "cpu")
        if init_options.initialise and not init_options.meta:
            table = starting_table(table, config, words)
        self.embedding = nn.Embedding(*size, _weight=table)

    def tokens(self) -> Tensor:
        """Return the virtual tokens (tokens, hidden)."""
        weight = self.embedding.weight
        return weight if weight.shape[0] == self.count else weight[: self.count]

    def all_tokens(self) -> Tensor:
        """Return the virtual tokens, also those that do not act: (tokens of all submodules, hidden)."""
        return self.embedding.weight

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the table (tokens, hidden), those of `indices` (tokens,)."""
        return self.embedding.weight[indices]

    def slots(self) -> dict[str, Slot]:
        """Return what a file holds: the table."""
        return {TABLE: Slot.of(self.embedding, "weight")}


class PromptTuner(TunerBase):
    """Puts a learned prompt before the rows that use it."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Mount a `PromptEmbedding`.

        Raises:
            ConfigError, ModelError: the dimensions are unknown, or do not fit.
        """
        found = dimensions.resolve(base, config)
        words = Words.of(base) if needs_words(config) and not config.inference_mode else None
        return Plan(mounts={"prompt_encoder": partial(PromptEmbedding, config, dimensions.size(config, found), words)}, resolved=found)

    def prepare(self, call: Call) -> Call:
        """Offer the prompts of the adapters in use."""
        encoders: Mapping[str, Any] = self.mounted.get("prompt_encoder", {})
        for adapter, rows in call.share(encoders):
            encoder, what = encoders[adapter], "all_tokens" if call.entire else "tokens"
            call = call.adding(VirtualTokens(rows, embeds=self.selection.cached_result(what, encoder, partial(encoder, what))))
        return call
