"""A chat: the cache that a `generate` has returned is given to the next, and the tokens are those of one call without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peft_core
from peft_core import CapabilityError, PeftConfig, get_peft_model
from peft_lora import LoraConfig
from peft_prompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from support import randomise

IDS = torch.tensor([[3, 9, 4, 17, 5, 6], [9, 22, 6, 5, 33, 8]])
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HOW: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOKENS: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
METHODS = {
    "prompt": PromptTuningConfig(**TOKENS),
    "p-tuning": PromptEncoderConfig(**TOKENS, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(**TOKENS),
    "neutral": PrefixTuningConfig(**TOKENS, init_weights="neutral"),
}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def made(config: PeftConfig, base: Any = None) -> Any:
    model: Any = get_peft_model(llama() if base is None else base, copy.deepcopy(config)).eval()
    randomise(model, "default")
    return model


def turns(model: Any, cache: Any = None, *, mask: Tensor | None = None, only_new: bool = False, **options: Any) -> None:
    """Compare three turns with one cache to calls without."""
    mask = torch.ones_like(IDS) if mask is None else mask
    sequence = IDS
    given = {} if cache is None else {"past_key_values": cache}
    for turn in range(3):
        expected = model.generate(input_ids=sequence, attention_mask=mask, max_new_tokens=3, **HOW, **options)
        seen = sequence[:, -3:] if only_new and turn else sequence
        found = model.generate(input_ids=seen, attention_mask=mask, max_new_tokens=3, **given, **HOW, **options)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
        assert found.sequences[:, -3:].tolist() == expected.sequences[:, -3:].tolist()
        given = {"past_key_values": found.past_key_values}
        sequence = torch.cat([expected.sequences, IDS[:, turn : turn + 2]], 1)
        mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_grows(method: str) -> None:
    turns(made(METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_of_fixed_size(method: str) -> None:
    model = made(METHODS[method])
    turns(model, transformers.StaticCache(config=model.config, max_cache_len=22))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_padding_on_the_left(method: str) -> None:
    turns(made(METHODS[method]), mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 asks for the whole text, without adapters too")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_only_the_new_tokens_are_given(method: str) -> None:
    turns(made(METHODS[method]), only_new=True)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_in_a_cache_scope(method: str) -> None:
    model = made(METHODS[method])
    with peft_core.cached(model):
        turns(model)


@pytest.mark.parametrize("second", ["prefix", "lora", "prompt"])
def test_two_adapters(second: str) -> None:
    """Two in use at a time: their virtual tokens add up; and rows under different ones."""
    model = made(METHODS["prompt"])
    other = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if second == "lora" else copy.deepcopy(METHODS[second])
    if second == "prompt":
        other = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model.add_adapter("second", other)
    randomise(model, "second", 9)
    turns(model, adapter_names=["default", "second"])
    turns(model, adapter_names=["__base__", "second"])
    model.set_adapter(["default", "second"])
    turns(model.eval())


def test_text_in_chunks_behind_a_cache_is_refused() -> None:
    model = made(METHODS["prefix"])
    first = model.generate(input_ids=IDS, max_new_tokens=3, prefill_chunk_size=4, **HOW)
    with pytest.raises(CapabilityError, match="prefill_chunk_size"):
        model.generate(input_ids=first.sequences, max_new_tokens=3, prefill_chunk_size=4, past_key_values=first.past_key_values, **HOW)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_models(family: str, method: str) -> None:
    torch.manual_seed(0)
    if family == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        base: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, pad_token_id=0, eos_token_id=None))
    else:
        layers = {
            f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
        }
        config = transformers.BartConfig(vocab_size=64, d_model=32, **layers, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        config.decoder_start_token_id, config.forced_eos_token_id = 1, None
        base = transformers.BartForConditionalGeneration(config)
    tokens = METHODS[method].to_dict() | {"task_type": "SEQ_2_SEQ_LM"}
    model = made(peft_core.get_peft_config({k: v for k, v in tokens.items() if v is not None}), base.eval())
    start = torch.full((2, 1), base.config.decoder_start_token_id)
    text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    first = model.generate(**text, decoder_input_ids=start, max_new_tokens=3, **HOW)
    turn = torch.cat([first.sequences, IDS[:, :2]], 1)
    text["decoder_attention_mask"] = torch.ones_like(turn)  # without one transformers takes all tokens for new ones, also of a bare model
    expected = model.generate(**text, decoder_input_ids=turn, max_new_tokens=4, **HOW)
    found = model.generate(**text, decoder_input_ids=turn, max_new_tokens=4, past_key_values=first.past_key_values, **HOW)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
