"""`generate` with virtual tokens under every kind of cache and every way to choose tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from peft_core import CapabilityError, PeftModel
from peft_core.testing import tiny
from prompt.families import FAMILIES, METHODS, N, made

DECODERS = [name for name, family in FAMILIES.items() if family.causal]
KINDS = ["prompt", "prefix"]


def left_padded(rows: int = 2) -> dict[str, Tensor]:
    inputs = FAMILIES["llama"].inputs(rows)
    if rows > 1:
        inputs["input_ids"][1, :3] = 0
        inputs["attention_mask"][1, :3] = 0
    return inputs


def generated(model: PeftModel, new: int = 8, **how: Any) -> Tensor:
    how = {**left_padded(), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None, **how}
    found: Tensor = model.generate(**how)
    return found


@pytest.fixture(params=[(method, family) for method in KINDS for family in DECODERS], ids=lambda pair: "-".join(pair))
def model(request: pytest.FixtureRequest) -> PeftModel:
    return made(*request.param)


def test_static_caches_have_room_for_virtual_tokens(model: PeftModel) -> None:
    expected = generated(model)
    for _ in range(2):  # older versions keep the cache of the first call
        assert torch.equal(generated(model, cache_implementation="static"), expected)
    assert torch.equal(generated(model, new=12, cache_implementation="static")[:, : expected.shape[1]], expected)


def test_a_cache_of_ones_own(model: PeftModel) -> None:
    expected = generated(model)
    config: Any = model.get_base_model().config
    assert torch.equal(generated(model, past_key_values=StaticCache(config=config, max_cache_len=40)), expected)
    cache = DynamicCache(config=config)
    assert torch.equal(generated(model, past_key_values=cache), expected)
    assert cache.get_seq_length() == N + expected.shape[1] - 1


def test_embeddings_instead_of_ids(model: PeftModel) -> None:
    expected = generated(model)
    given = left_padded()
    base: Any = model.get_base_model()
    words = base.get_input_embeddings()
    found = generated(model, input_ids=None, inputs_embeds=words(given["input_ids"]))
    assert torch.equal(found, expected[:, given["input_ids"].shape[1] :])


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}], ids=["lookup", "assistant"])
def test_assisted(model: PeftModel, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Guessed tokens that are wrong are taken out of the cache again, and no virtual ones with them."""
    import transformers

    inputs = left_padded(1)
    expected = generated(model, new=12, **inputs)
    if "assistant" in how:
        family = next(name for name in DECODERS if type(tiny(name)) is type(model.get_base_model()))
        how = {"assistant_model": tiny(family, seed=1)}
    if transformers.__version__.startswith("4."):  # there caches are cut to an absolute length, which knows of no virtual tokens
        with pytest.raises(CapabilityError, match="needs transformers 5"):
            generated(model, new=12, **inputs, **how)
        return
    assert torch.equal(generated(model, new=12, **inputs, **how), expected)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "sampling", "several"]
)
def test_other_ways_to_choose(method: str, family: str, how: dict[str, Any]) -> None:
    """As the bare base does after the same virtual tokens."""
    model = made(method, family)
    torch.manual_seed(7)
    found = generated(model, **how)
    bare: Any = tiny(family)
    given = left_padded()
    prompt = model.get_prompt(2)
    mask = torch.cat([torch.ones(2, N, dtype=torch.long), given["attention_mask"]], dim=1)
    copies = how.get("num_beams", how.get("num_return_sequences", 1))
    torch.manual_seed(7)
    if METHODS[method].keys_values:
        expected = stepwise(model, how, copies)
    else:
        start = torch.cat([prompt, bare.get_input_embeddings()(given["input_ids"])], dim=1)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None, **how}
        new = bare.generate(inputs_embeds=start, attention_mask=mask, **options)
        expected = torch.cat([given["input_ids"].repeat_interleave(1 if "num_beams" in how else copies, dim=0), new], dim=1)
    assert torch.equal(found, expected)


def stepwise(model: PeftModel, how: dict[str, Any], copies: int) -> Tensor:
    """Without a cache each step is a whole forward of its own."""
    return generated(model, use_cache=False, **how)


def test_threads_generate_side_by_side() -> None:
    model = made("prompt", "llama")
    model.add_adapter("prefix", made("prefix", "llama").peft_config["default"])
    expected = {}
    for name in ("default", "prefix"):
        with model.use_adapters(name):
            expected[name] = generated(model)
    assert not torch.equal(expected["default"], expected["prefix"])

    def work(number: int) -> None:
        name = ("default", "prefix")[number % 2]
        with model.use_adapters(name):
            assert torch.equal(generated(model), expected[name])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_no_warnings_about_positions(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    model = made("prompt", "llama")
    generated(model)
    assert not [warning for warning in recwarn if "position" in str(warning.message)]
    assert "position" not in caplog.text


def test_a_cache_without_room_says_so() -> None:
    model = made("prefix", "llama")
    config: Any = model.get_base_model().config
    inputs = left_padded()
    with pytest.raises(CapabilityError, match="the cache has room for 3 tokens, but 4 virtual ones come first"), torch.no_grad():
        model(**inputs, past_key_values=StaticCache(config=config, max_cache_len=3))


def test_a_model_that_hears() -> None:
    """A Whisper reads no ids: prefixes of its decoder work, prompts before its encoder's text can't."""
    import transformers

    from peft_core import RoutingError, get_peft_config, get_peft_model

    torch.manual_seed(0)
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    sizes: dict[str, Any] = {**dict.fromkeys(names, 2), "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "d_model": 16}
    tokens: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    rest: dict[str, Any] = {"max_source_positions": 20, "max_target_positions": 30, "suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(**sizes, **tokens, **rest)
    whisper: Any = transformers.WhisperForConditionalGeneration(config)
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
    model = get_peft_model(whisper, get_peft_config({"peft_type": "PREFIX_TUNING", **common}), "prefix").eval()
    model.add_adapter("prompt", get_peft_config({"peft_type": "PROMPT_TUNING", **common}))
    sound = torch.randn(2, 8, 40)
    how: dict[str, Any] = {"input_features": sound, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert model.generate(**how).shape[0] == 2
    model.set_adapter("prompt")
    with pytest.raises(RoutingError, match="needs input_ids or inputs_embeds"):
        model.generate(**how)
