"""Tiny models with reproducible random weights, built from configs without files or network access."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, did_you_mean, listed

VOCABULARY = 64


def _llama(head: str = "LlamaForCausalLM", **extra: Any) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
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
        **extra,
    )
    model: nn.Module = getattr(transformers, head)(config)
    return model


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

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
    vars(config)["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _roberta(head: str, **extra: Any) -> nn.Module:
    import transformers

    config = transformers.RobertaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=1,
        **extra,
    )
    model: nn.Module = getattr(transformers, head)(config)
    return model


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


class ConvNet(nn.Module):
    """Two convolutions and a classifier; the forward takes `pixels` (rows, 3, …) and returns (rows, 4)."""

    def __init__(self, conv: type[nn.Conv1d] | type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3, stride=2, padding=1)
        self.body = conv(6, 5, 2, dilation=2, bias=False)
        self.classifier = nn.Linear(5, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores of 4 classes."""
        features: Tensor = self.body(nn.functional.gelu(self.stem(pixels)))
        scores: Tensor = self.classifier(features.flatten(2).mean(-1))
        return scores


class OneLayer(nn.Module):
    """A model that consists of one layer, the attribute ``target``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.target = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        found: Tensor = self.target(x)
        return found


#: name → function that builds the model
BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-seq-cls": functools.partial(_llama, "LlamaForSequenceClassification", num_labels=3),
    "gpt2": _gpt2,
    "bert": functools.partial(_bert, "BertModel"),
    "bert-seq-cls": functools.partial(_bert, "BertForSequenceClassification", num_labels=3),
    "bert-token-cls": functools.partial(_bert, "BertForTokenClassification", num_labels=3),
    "bert-qa": functools.partial(_bert, "BertForQuestionAnswering"),
    "gemma3": _gemma3,
    "roberta-seq-cls": functools.partial(_roberta, "RobertaForSequenceClassification", num_labels=3),
    "t5": _t5,
    "bart": _bart,
    "conv1d-net": functools.partial(ConvNet, nn.Conv1d),
    "conv2d-net": functools.partial(ConvNet, nn.Conv2d),
}
#: name → the `task_type` of configs for this model; models without a task are not listed
TASKS = {
    "llama": "CAUSAL_LM",
    "llama-seq-cls": "SEQ_CLS",
    "gpt2": "CAUSAL_LM",
    "gemma3": "CAUSAL_LM",
    "roberta-seq-cls": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "bert-seq-cls": "SEQ_CLS",
    "bert-token-cls": "TOKEN_CLS",
    "bert-qa": "QUESTION_ANS",
}


def inputs_of(name: str, rows: int) -> dict[str, Tensor]:
    """Return inputs with `rows` rows for the tiny model `name`, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    if name in ("conv1d-net", "conv2d-net"):
        return {"pixels": torch.randn(rows, 3, *[9] * (1 if name == "conv1d-net" else 2), generator=generator)}
    ids = torch.randint(1, VOCABULARY, (rows, 6), generator=generator)
    extra = {"decoder_input_ids": ids.flip(1)[:, :4]} if name in ("t5", "bart") else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU random generator inside the block, and restore its previous state afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def unsettle(model: nn.Module) -> nn.Module:
    """Change freshly initialised weights in place, reproducibly, so that errors become visible in the outputs; return the model.

    Random values are added to vectors (biases, weights of norms), which are initialised to 0 or 1, so that leaving one out changes the outputs.
    Matrices that transformers initialises with a standard deviation of 0.02 are scaled to 0.15: after several layers with small weights, the
    effect of a single layer would no longer be visible in the outputs.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif parameter.numel() > 1 and float(parameter.std()) < 0.05:
                parameter.mul_(0.15 / float(parameter.std()))
    return model


@functools.cache
def _built(name: str, seed: int) -> nn.Module:
    with seeded(seed):
        return unsettle(BASES[name]()).eval()


def tiny(name: str = "llama", seed: int = 0) -> nn.Module:
    """Return a fresh copy of a tiny model in eval mode, with the same weights in each call; no bias is 0, and no weight of a norm is 1.

    Args:
        name: a key of `BASES`.
        seed: the seed of the random weights.

    Raises:
        ConfigError: there is no model of this name.
    """
    if name not in BASES:
        raise ConfigError(f"there is no tiny model {name!r}", hint=did_you_mean(name, BASES) or f"there are {listed(BASES)}")
    return copy.deepcopy(_built(name, seed))
