"""How prompts start, what dimensions they have, and which configs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peft_core import ConfigError, PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny


def made(base: Any = "llama", **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **fields}
    return get_peft_model(tiny(base) if isinstance(base, str) else base, get_peft_config(fields)).eval()


def table(model: Any) -> Tensor:
    return model.prompt_encoder["default"].embedding.weight.detach()


def words(base: str = "llama") -> Tensor:
    return tiny(base).get_input_embeddings().weight.detach()  # type: ignore[operator]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """Words a to e are 5 to 9; every text is put between 1 and 2."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{word: 5 + i for i, word in enumerate("abcde")}}
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), encoding="utf-8")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
@pytest.mark.parametrize(("count", "expected"), [(3, [1, 5, 6]), (5, [1, 5, 6, 7, 2]), (12, [1, 5, 6, 7, 2, 1, 5, 6, 7, 2, 1, 5])])
def test_text(tokenizer: str, method: str, count: int, expected: list[int]) -> None:
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b c", "tokenizer_name_or_path": tokenizer}
    model = made(peft_type=method, num_virtual_tokens=count, tokenizer_kwargs={"trust_remote_code": True}, **options)
    assert torch.equal(table(model), words()[expected])


def test_embedding_modules_that_scale() -> None:
    """Gemma multiplies its embeddings by √width; the prompt starts from what its module returns."""
    model = made("gemma3", prompt_tuning_init="SAMPLE_VOCAB")
    torch.manual_seed(0)
    torch.empty(5, 32).normal_()
    expected = words("gemma3")[torch.randint(0, 64, (5,))] * 32**0.5
    torch.testing.assert_close(table(model), expected)


def test_scale_of_the_words() -> None:
    plain, scaled = made(num_virtual_tokens=40), made(num_virtual_tokens=40, random_scale="words")
    torch.testing.assert_close(table(scaled), table(plain) * words().std())
    assert abs(float(table(plain).std()) - 1) < 0.1
    gemma = made("gemma3", num_virtual_tokens=200, random_scale="words")
    assert abs(float(table(gemma).std()) / (float(words("gemma3").std()) * 32**0.5) - 1) < 0.05


def test_distinct_words() -> None:
    base: Any = tiny("llama")
    base.config.pad_token_id, base.config.eos_token_id = 0, [2, 3]
    model = made(base, prompt_tuning_init="SAMPLE_VOCAB", distinct_words=True, num_virtual_tokens=61)
    found = {tuple(row.tolist()) for row in table(model)}
    assert found == {tuple(row.tolist()) for number, row in enumerate(words()) if number not in (0, 2, 3)}
    with pytest.raises(ConfigError, match="61 tokens that are not special, but the prompt needs 62"):
        made(base.__class__(base.config), prompt_tuning_init="SAMPLE_VOCAB", distinct_words=True, num_virtual_tokens=62)


def test_fields_of_ours_are_written_only_where_they_are_chosen(tmp_path: Path) -> None:
    for fields in ({}, {"random_scale": "words"}, {"prompt_tuning_init": "SAMPLE_VOCAB", "distinct_words": True}):
        made(**fields).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
        assert {"random_scale", "distinct_words"} & written.keys() == {"random_scale", "distinct_words"} & fields.keys()
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).peft_config["default"]
        assert {name: getattr(loaded, name) for name in fields} == fields


def test_wrong_configs() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"random_scale": "word"}, "did you mean 'words'"),
        ({"random_scale": "words", "prompt_tuning_init": "SAMPLE_VOCAB"}, "how random numbers are drawn, but prompt_tuning_init is 'SAMPLE_VOCAB'"),
        ({"distinct_words": True}, "how tokens are drawn, but prompt_tuning_init is 'RANDOM'"),
        ({"prompt_tuning_init": "SAMPLE_VOCABULARY"}, "did you mean 'SAMPLE_VOCAB'"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "prompt_tuning_init='EXACT_SOURCE_TASK' is unknown"),
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path can't be None"),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs only valid"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is not set"),
        ({"peft_type": "P_TUNING", "encoder_reparameterization_type": "LTSM"}, "did you mean 'LSTM'"),
        ({"peft_type": "P_TUNING", "encoder_dropout": 1.0}, "encoder_dropout"),
        ({"peft_type": "P_TUNING", "encoder_num_layers": 0}, "encoder_num_layers"),
        ({"peft_type": "P_TUNING", "encoder_hidden_size": -1}, "encoder_hidden_size"),
        ({"peft_type": "PREFIX_TUNING", "init_weights": "zeros"}, "init_weights='zeros' is unknown"),
    ]
    for fields, message in wrong:
        with pytest.raises(ConfigError, match=message):
            made(**fields)


# ---- encoder-decoder models --------------------------------------------------------------------------------------------
def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=0)
    )


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize(("base", "layers", "heads", "width"), [(t5, 2, 4, 24), (bart, 3, 2, 16)])
def test_a_prefix_is_the_decoders(base: Any, layers: int, heads: int, width: int, tmp_path: Path) -> None:
    """T5's heads do not add up to its hidden width; BART's decoder has fewer heads and more layers than its encoder."""
    model = made(base(), peft_type="PREFIX_TUNING", task_type="SEQ_2_SEQ_LM")
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim, config.num_transformer_submodules) == (layers, heads, width, 2)
    assert table(model).shape == (5, 2 * layers * width)
    ids = torch.randint(3, 64, (2, 6))
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        bare = model.base_model(input_ids=ids, decoder_input_ids=ids[:, :4], use_cache=False).logits  # 4.56 makes a cache for the encoder's layers
    assert expected.shape == bare.shape
    assert not torch.allclose(expected, bare, atol=1e-3)
    model.save_pretrained(tmp_path)
    fresh = base()
    fresh.load_state_dict(model.get_base_model().state_dict())
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(input_ids=ids, decoder_input_ids=ids[:, :4]).logits, expected)
    with pytest.raises(ConfigError, match=f"keys and values for 4 layers, but .* has {layers}"):
        made(base(), peft_type="PREFIX_TUNING", task_type="SEQ_2_SEQ_LM", num_layers=4)
    with pytest.raises(ConfigError, match=f"have width {width}"):
        made(base(), peft_type="PREFIX_TUNING", task_type="SEQ_2_SEQ_LM", token_dim=8)


@pytest.mark.parametrize(("submodules", "parts"), [(1, [0, 1, 2, 3]), (2, [0, 2, 0, 2])])
def test_which_layer_takes_which_part(submodules: int, parts: list[int]) -> None:
    """As other readers of the format take them: with two submodules every second part."""
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=4, num_heads=4, pad_token_id=0)
    base = transformers.T5ForConditionalGeneration(config)
    model = made(base, peft_type="PREFIX_TUNING", task_type="SEQ_2_SEQ_LM", num_transformer_submodules=submodules)
    values = table(model).view(5, 8, 4, 4)  # (tokens, 2·layers, heads, head_dim)
    for part, (keys, own_values) in zip(parts, model.prompt_encoder["default"].keys_values(), strict=True):
        assert torch.equal(keys, values[:, 2 * part].permute(1, 0, 2))
        assert torch.equal(own_values, values[:, 2 * part + 1].permute(1, 0, 2))


def test_layers_of_a_decoder_that_has_more() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4, pad_token_id=0)
    model = made(transformers.T5ForConditionalGeneration(config), peft_type="PREFIX_TUNING", task_type="SEQ_2_SEQ_LM")
    assert model.peft_config["default"].num_layers == 3
    assert len(model.prompt_encoder["default"].keys_values()) == 3


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING"])
def test_of_two_halves_the_first_acts(method: str) -> None:
    model = made("t5", peft_type=method, task_type="SEQ_2_SEQ_LM")
    assert table(model).shape == (10, 32)
    prompt = model.prompt_encoder["default"].tokens().detach()
    assert prompt.shape == (5, 32)
    bare: Any = tiny("t5")
    ids = torch.randint(3, 64, (2, 6))
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        sequence = torch.cat([prompt.expand(2, -1, -1), bare.get_input_embeddings()(ids)], dim=1)
        expected = bare(inputs_embeds=sequence, decoder_input_ids=ids[:, :4]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
