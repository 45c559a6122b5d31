"""Prompt tuning. Source: arXiv 2104.08691."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, InitOptions, Plan, Slot, TunerBase, VirtualTokens

from . import dimensions
from .config import START_FIELDS, PromptTuningConfig
from .encoders import INITIAL, Encoder
from .initial_values import Vocabulary, initial_table, needs_vocabulary
from .tensor_names import TABLE


class PromptEmbedding(Encoder):
    """The embedding table of the virtual tokens: `embedding.weight` (tokens, hidden) in float32.

    Args:
        config: how many virtual tokens, and how they are initialised.
        size: (num_transformer_submodules · num_virtual_tokens, hidden); a forward uses only the first num_virtual_tokens. None: read from
            the config; a module in place of the tuple: also read from the config, and the module embeds the base's vocabulary.
        vocabulary: the base's vocabulary, for initial values; None: the initialisation does not use it.
        init_options: whether initial values are needed.
    """

    def __init__(
        self,
        config: PromptTuningConfig,
        size: tuple[int, int] | nn.Module | None = None,
        vocabulary: Vocabulary | None = None,
        init_options: InitOptions = INITIAL,
    ) -> None:
        super().__init__()
        if not isinstance(size, tuple):
            vocabulary = Vocabulary(size, frozenset()) if size is not None else vocabulary
            size = dimensions.size(config, dimensions.of_config(config))
        self.count = int(config.num_virtual_tokens or 0)
        table = torch.empty(size, device="meta" if init_options.meta else "cpu")
        if init_options.initialise and not init_options.meta:
            table = initial_table(table, config, vocabulary)
        self.embedding = nn.Embedding(*size, _weight=table)

    def tokens(self) -> Tensor:
        """Return the virtual tokens that a forward uses (num_virtual_tokens, hidden)."""
        weight = self.embedding.weight
        return weight if weight.shape[0] == self.count else weight[: self.count]

    def all_tokens(self) -> Tensor:
        """Return the whole table, including the virtual tokens that no forward uses: (tokens of all submodules, hidden)."""
        return self.embedding.weight

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows (tokens, hidden) of the table at the indices `indices` (tokens,)."""
        return self.embedding.weight[indices]

    def slots(self) -> dict[str, Slot]:
        """Return the slots of the tensors in a file: the table."""
        return {TABLE: Slot.of(self.embedding, "weight")}


class PromptTuner(TunerBase):
    """Prepends learned virtual tokens to the inputs of the rows that use the adapter."""

    start_fields: ClassVar[frozenset[str]] = START_FIELDS

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan a `PromptEmbedding`, mounted beside the base.

        Raises:
            ConfigError, ModelError: the prompt's dimensions can't be read from the configs, or do not fit the base.
        """
        resolved = dimensions.resolve(base, config)
        vocabulary = Vocabulary.of(base) if needs_vocabulary(config) and not config.inference_mode else None
        return Plan(mounts={"prompt_encoder": partial(PromptEmbedding, config, dimensions.size(config, resolved), vocabulary)}, resolved=resolved)

    def prepare(self, call: Call) -> Call:
        """Return the call with the virtual tokens of the adapters in use; if `call.entire`, also those that no forward uses."""
        encoders: Mapping[str, Any] = self.mounted.get("prompt_encoder", {})
        for adapter, rows in call.share(encoders):
            encoder, method = encoders[adapter], "all_tokens" if call.entire else "tokens"
            call = call.adding(VirtualTokens(rows, embeds=self.selection.cached_result(method, encoder, partial(encoder, method))))
        return call
