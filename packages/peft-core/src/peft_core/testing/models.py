"""Tiny models with random weights, built from configs: the same weights each time, no files, no network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, did_you_mean, listed

VOCABULARY = 64


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    )


def _bert(head: str, **extra: Any) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        **extra,
    )
    model: nn.Module = getattr(transformers, head)(config)
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0))


#: name → what builds it
BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": functools.partial(_bert, "BertModel"),
    "bert-seq-cls": functools.partial(_bert, "BertForSequenceClassification", num_labels=3),
    "bert-token-cls": functools.partial(_bert, "BertForTokenClassification", num_labels=3),
    "bert-qa": functools.partial(_bert, "BertForQuestionAnswering"),
    "t5": _t5,
}


@functools.cache
def _built(name: str, seed: int) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return BASES[name]().eval()
    finally:
        torch.set_rng_state(state)


def tiny(name: str = "llama", seed: int = 0) -> nn.Module:
    """Return a fresh copy of a tiny model in eval mode, with the same weights each time.

    Args:
        name: a key of `BASES`.
        seed: of its weights.

    Raises:
        ConfigError: there is no model of this name.
    """
    if name not in BASES:
        raise ConfigError(f"there is no tiny model {name!r}", hint=did_you_mean(name, BASES) or f"there are {listed(BASES)}")
    return copy.deepcopy(_built(name, seed))
