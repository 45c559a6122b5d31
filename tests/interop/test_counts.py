"""Parameter counts: the worked examples of the reference page (api.md §11), and all cases against the peer."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from interop.cases import CASES, Case, ours, peer, using

BERT = {"vocab_size": 28996}  # bert-base-cased
GPT2 = {"n_embd": 1280, "n_layer": 36, "n_head": 20}  # gpt2-large
T5 = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}  # t5-base

#: the page's six dictionaries, key for key: they are handed to `get_peft_config` as they stand
PAGE: dict[str, dict[str, Any]] = {
    "sequence-classification": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "SEQ_CLS",
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 768,
        "num_transformer_submodules": 1,
        "num_attention_heads": 12,
        "num_layers": 12,
        "encoder_hidden_size": 768,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    },
    "token-classification": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "TOKEN_CLS",
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 768,
        "num_transformer_submodules": 1,
        "num_attention_heads": 12,
        "num_layers": 12,
        "encoder_hidden_size": 768,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    },
    "causal-lm": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 1280,
        "num_transformer_submodules": 1,
        "num_attention_heads": 20,
        "num_layers": 36,
        "encoder_hidden_size": 1280,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    },
    "seq2seq-lm": {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q", "v"],
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
    },
    "question-answering": {
        "peft_type": "LORA",
        "task_type": "QUESTION_ANS",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    },
    "feature-extraction": {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    },
}
LEGACY = {"postprocess_past_key_value_function", "enable_lora"}


@dataclass(frozen=True)
class Row:
    """One row of the table of api.md §11.

    Args:
        given: the dictionary.
        cls: class of our model and of the peer's.
        architecture: class of the base.
        base, trainable, total: numbers of parameters, today.
        printed: the line of `print_trainable_parameters`.
    """

    given: dict[str, Any]
    cls: str
    architecture: str
    base: int
    trainable: int
    total: int
    printed: str


_SEQUENCES, _TOKENS = "BertForSequenceClassification", "BertForTokenClassification"
_EXTRA = PAGE["question-answering"]
ROWS = {
    "sequence-classification": Row(
        PAGE["sequence-classification"],
        *("PeftModelForSequenceClassification", _SEQUENCES, 108_311_810, 370_178, 108_681_988),
        "trainable params: 370,178 || all params: 108,681,988 || trainable%: 0.3406",
    ),
    "token-classification": Row(
        PAGE["token-classification"],
        *("PeftModelForTokenClassification", _TOKENS, 107_721_218, 370_178, 108_091_396),
        "trainable params: 370,178 || all params: 108,091,396 || trainable%: 0.3425",
    ),
    # the page's import line takes a model for sequences here
    "token-classification-page": Row(
        PAGE["token-classification"],
        *("PeftModelForTokenClassification", _SEQUENCES, 108_311_810, 370_178, 108_681_988),
        "trainable params: 370,178 || all params: 108,681,988 || trainable%: 0.3406",
    ),
    "causal-lm": Row(
        PAGE["causal-lm"],
        *("PeftModelForCausalLM", "GPT2LMHeadModel", 774_030_080, 1_843_200, 775_873_280),
        "trainable params: 1,843,200 || all params: 775,873,280 || trainable%: 0.2376",
    ),
    "seq2seq-lm": Row(
        PAGE["seq2seq-lm"],
        *("PeftModelForSeq2SeqLM", "T5ForConditionalGeneration", 222_903_552, 884_736, 223_788_288),
        "trainable params: 884,736 || all params: 223,788,288 || trainable%: 0.3953",
    ),
    "question-answering": Row(
        PAGE["question-answering"],
        *("PeftModelForQuestionAnswering", "BertForQuestionAnswering", 107_721_218, 591_362, 108_312_580),
        "trainable params: 591,362 || all params: 108,312,580 || trainable%: 0.5460",
    ),
    "feature-extraction": Row(
        PAGE["feature-extraction"],
        *("PeftModelForFeatureExtraction", "BertModel", 108_310_272, 589_824, 108_900_096),
        "trainable params: 589,824 || all params: 108,900,096 || trainable%: 0.5416",
    ),
    "extra-sequence-lora": Row(
        {**_EXTRA, "task_type": "SEQ_CLS"},
        *("PeftModelForSequenceClassification", _SEQUENCES, 108_311_810, 591_362, 108_903_172),
        "trainable params: 591,362 || all params: 108,903,172 || trainable%: 0.5430",
    ),
    "extra-token-lora": Row(
        {**_EXTRA, "task_type": "TOKEN_CLS"},
        *("PeftModelForTokenClassification", _TOKENS, 107_721_218, 591_362, 108_312_580),
        "trainable params: 591,362 || all params: 108,312,580 || trainable%: 0.5460",
    ),
}
every_row = pytest.mark.parametrize("name", ROWS)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {"GPT2LMHeadModel": ("GPT2Config", GPT2), "T5ForConditionalGeneration": ("T5Config", T5)}


def on_meta(architecture: str) -> nn.Module:
    config, options = OPTIONS.get(architecture, ("BertConfig", BERT))
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, architecture)(getattr(transformers, config)(**options))
    return model


def read(given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return our config of a dictionary, and what was warned of. The dictionary stays as it was."""
    before = copy.deepcopy(given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = ours.get_peft_config(given)
    assert given == before
    return config, [str(warning.message) for warning in caught]


def without_legacy(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in LEGACY}


def shown(model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PAGE)
def test_dictionary_of_the_page(name: str) -> None:
    """It is read unchanged; the old key is named in one warning; every other key arrives."""
    config, warned = read(PAGE[name])
    legacy = LEGACY & PAGE[name].keys()
    assert len(warned) == len(legacy)
    assert all(f"{sorted(legacy)}" in text for text in warned)  # the old key and no other
    assert not any(hasattr(config, key) for key in LEGACY)
    for key, value in without_legacy(PAGE[name]).items():
        found = getattr(config, key)
        assert found == (set(value) if isinstance(value, list) else value), key
    assert type(config).__name__ == {"LORA": "LoraConfig", "PREFIX_TUNING": "PrefixTuningConfig"}[PAGE[name]["peft_type"]]


@every_row
@pytest.mark.parametrize("by", ["get_peft_model", "class"])
def test_row(name: str, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The page takes either way to a model: the function, or the class by its name."""
    row = ROWS[name]
    model = on_meta(row.architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == row.base
    config, _ = read(row.given)
    adapted = ours.get_peft_model(model, config) if by == "get_peft_model" else getattr(ours, row.cls)(model, config)
    assert type(adapted).__name__ == row.cls
    assert adapted.get_nb_trainable_parameters() == (row.trainable, row.total)
    assert shown(adapted, capsys) == row.printed + "\n"


@every_row
def test_row_of_the_peer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the peer says today: of dictionaries with an old key nothing, it refuses them; without the key, and of the others, the same."""
    row = ROWS[name]
    legacy = LEGACY & row.given.keys()
    with using(peer):
        if legacy:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(legacy))}'"):
                peer.get_peft_config(dict(row.given))
        config = peer.get_peft_config(without_legacy(row.given))
        adapted = peer.get_peft_model(on_meta(row.architecture), config)
        assert type(adapted).__name__ == row.cls
        assert adapted.get_nb_trainable_parameters() == (row.trainable, row.total)
        assert shown(adapted, capsys) == row.printed + "\n"
    found, _ = read(row.given)
    ours.get_peft_model(on_meta(row.architecture), found)
    differs = {key for key, value in config.to_dict().items() if found.to_dict()[key] != value}
    assert differs <= {"modules_to_save"}  # the peer writes the head's names into the list of the user (§12.14)


def test_the_rows_that_the_peer_reads_unchanged() -> None:
    accepted = set()
    for name, given in PAGE.items():
        with using(peer), contextlib.suppress(TypeError):
            peer.get_peft_config(dict(given))
            accepted.add(name)
    assert accepted == {"question-answering", "feature-extraction"}


def test_old_keys_in_a_file_are_one_warning_too(tmp_path: Path) -> None:
    for name in ("causal-lm", "seq2seq-lm"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PAGE[name]), "utf-8")
        with pytest.warns(UserWarning, match=next(iter(LEGACY & PAGE[name].keys()))) as caught:
            found = ours.PeftConfig.from_pretrained(tmp_path)
        assert len(caught) == 1
        with using(peer):
            expected = peer.PeftConfig.from_pretrained(tmp_path)
        assert {**found.to_dict(), "peft_version": None} == {**expected.to_dict(), "peft_version": None}


#: row -> (trainable, all) as the page prints them, and its percentage
PRINTED_THERE = {
    "sequence-classification": (370_178, 108_680_450, 0.3406113979101117),
    "causal-lm": (1_843_200, 775_873_280, 0.23756456724479544),
    "seq2seq-lm": (884_736, 223_843_584, 0.3952474242013566),
    "question-answering": (592_900, 108_312_580, 0.5473971721475013),
}
HEAD = 768 * 2 + 2


@pytest.mark.parametrize("name", PRINTED_THERE)
def test_the_pages_own_figures_differ_for_a_known_reason(name: str) -> None:
    trainable, total, percent = PRINTED_THERE[name]
    assert 100 * trainable / total == pytest.approx(percent, rel=0, abs=1e-15)
    row = ROWS[name]
    more_trainable, more = {
        "sequence-classification": (0, -HEAD),  # the head is there twice today, and was once
        "causal-lm": (0, 0),
        "seq2seq-lm": (0, 72 * 768),  # 72 layers had a bias of their own
        "question-answering": (HEAD, 0),  # the original head counted as trainable
    }[name]
    assert (row.trainable + more_trainable, row.total + more) == (trainable, total)


@every_row
def test_figures_follow_from_the_shapes(name: str) -> None:
    """Prefixes: n · 2 · layers · width; LoRA: layers · r · (in + out); a head twice, once of them to be trained."""
    row, given = ROWS[name], ROWS[name].given
    if given["peft_type"] == "PREFIX_TUNING":
        own = given["num_virtual_tokens"] * 2 * given["num_layers"] * given["token_dim"]
    else:
        own = {"T5ForConditionalGeneration": 36 * 2}.get(row.architecture, 12 * 2) * given["r"] * (768 + 768)
    head = HEAD if given["task_type"] in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else 0
    assert (row.trainable, row.total) == (own + head, row.base + own + head)


@pytest.mark.parametrize(
    ("trainable", "rest", "line"),
    [
        (1, 2, "trainable params: 1 || all params: 3 || trainable%: 33.3333"),
        (1_000, 0, "trainable params: 1,000 || all params: 1,000 || trainable%: 100.0000"),
        (0, 1_234_567, "trainable params: 0 || all params: 1,234,567 || trainable%: 0.0000"),
        (1, 3_999_999, "trainable params: 1 || all params: 4,000,000 || trainable%: 0.0000"),
    ],
)
def test_printed_line(trainable: int, rest: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Thousands with commas, four decimals, single blanks (api.md §2.10); the peer prints the same."""
    for library in (ours, peer):
        with using(library):
            model = library.get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=False)), library.LoraConfig(target_modules=["0"]))
            for name, parameter in list(model.named_parameters()):
                holder, _, last = name.rpartition(".")
                del parameter
                delattr(model.get_submodule(holder), last)
            for count, learns in ((trainable, True), (rest, False)):
                if count:
                    model.register_parameter(f"p{count}", nn.Parameter(torch.empty(count), requires_grad=learns))
            assert model.get_nb_trainable_parameters() == (trainable, trainable + rest)
            assert shown(model, capsys) == line + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_counts(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    counts = []
    for library in (ours, peer):
        model = case.make(library)
        with using(library):
            counts.append(model.get_nb_trainable_parameters())
            model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert counts[0] == counts[1]
    assert printed[0] == printed[1]
