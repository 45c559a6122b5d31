"""Prompt tuning. Source: arXiv 2104.08691."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, ConfigError, Creation, Plan, Slot, TunerBase, VirtualTokens

from . import dimensions
from .config import PromptTuningConfig, PromptTuningInit


class PromptEmbedding(nn.Module):
    """The table of a prompt: `embedding.weight` (tokens, hidden) in float32.

    Args:
        config: how it starts.
        size: (tokens, hidden).
        word_embeddings: the base's embeddings, for starting values from the vocabulary.
        creation: whether starting values are needed.
    """

    def __init__(self, config: PromptTuningConfig, size: tuple[int, int], word_embeddings: nn.Module | None, creation: Creation) -> None:
        super().__init__()
        device = "meta" if creation.meta else "cpu"
        table = torch.empty(size, device=device)
        if creation.initialise and not creation.meta:
            table.normal_()
            if word_embeddings is not None:
                ids = _starting_ids(config, size[0], word_embeddings)
                with torch.no_grad():
                    table = word_embeddings(ids.to(next(word_embeddings.parameters()).device)).detach().float().cpu().clone()
        self.embedding = nn.Embedding(*size, _weight=table)

    def tokens(self) -> Tensor:
        """Return the virtual tokens (tokens, hidden)."""
        return self.embedding.weight

    def slots(self) -> dict[str, Slot]:
        """Return what a file holds: the table."""
        return {"prompt_embeddings": Slot.of(self.embedding, "weight")}


def _starting_ids(config: PromptTuningConfig, count: int, word_embeddings: nn.Module) -> Tensor:
    """Return the ids (count,) of the tokens that a prompt starts from."""
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return torch.randint(0, int(word_embeddings.num_embeddings), (count,))  # type: ignore[arg-type]
    from transformers import AutoTokenizer

    options = dict(config.tokenizer_kwargs or {})
    options.pop("trust_remote_code", None)  # a config file must not make us run code
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens", hint="write some text")
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])


class PromptTuner(TunerBase):
    """Puts a learned prompt before the rows that use it."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Mount a `PromptEmbedding`."""
        found = dimensions.resolve(base, config)
        size = (config.num_virtual_tokens * found["num_transformer_submodules"], found["token_dim"])
        starts_from_words = config.prompt_tuning_init != PromptTuningInit.RANDOM and not config.inference_mode
        words = base.embeddings if starts_from_words else None
        return Plan(mounts={"prompt_encoder": partial(PromptEmbedding, config, size, words)}, resolved=found)

    def prepare(self, call: Call) -> Call:
        """Offer the prompts of the adapters in use."""
        encoders = self.mounted.get("prompt_encoder", {})
        for adapter, rows in call.share(encoders):
            call = call.adding(VirtualTokens(rows, embeds=encoders[adapter].tokens()))  # type: ignore[operator]
        return call
