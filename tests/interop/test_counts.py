"""Parameter counts: the worked examples of the reference page (api.md §11), and all cases against the peer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from interop.cases import CASES, Case, ours, peer, using

BERT = {"vocab_size": 28996}  # bert-base-cased
GPT2 = {"n_embd": 1280, "n_layer": 36, "n_head": 20}  # gpt2-large
T5 = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}  # t5-base

_PREFIX = {
    "peft_type": "PREFIX_TUNING",
    "inference_mode": False,
    "num_virtual_tokens": 20,
    "num_transformer_submodules": 1,
    "prefix_projection": False,
    "postprocess_past_key_value_function": None,
}
_PREFIX_BERT = {**_PREFIX, "token_dim": 768, "num_attention_heads": 12, "num_layers": 12, "encoder_hidden_size": 768}
_PREFIX_GPT2 = {**_PREFIX, "token_dim": 1280, "num_attention_heads": 20, "num_layers": 36, "encoder_hidden_size": 1280}
_LORA = {"peft_type": "LORA", "inference_mode": False, "fan_in_fan_out": False, "bias": "none", "lora_alpha": 32}
_LORA_T5 = {**_LORA, "r": 8, "target_modules": ["q", "v"], "lora_dropout": 0.1, "enable_lora": None}
_LORA_BERT = {**_LORA, "r": 16, "target_modules": ["query", "value"], "lora_dropout": 0.05}
LEGACY = {"postprocess_past_key_value_function", "enable_lora"}


def on_meta(architecture: str, config: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, architecture)(getattr(transformers, config)(**options))


EXAMPLES = {
    # name: architecture, its config, task, adapter, base's parameters, trainable, all
    "sequence-classification": ("BertForSequenceClassification", BERT, "SEQ_CLS", _PREFIX_BERT, 108_311_810, 370_178, 108_681_988),
    "token-classification": ("BertForTokenClassification", BERT, "TOKEN_CLS", _PREFIX_BERT, 107_721_218, 370_178, 108_091_396),
    # the page's import line takes a model for sequences here
    "token-classification-page": ("BertForSequenceClassification", BERT, "TOKEN_CLS", _PREFIX_BERT, 108_311_810, 370_178, 108_681_988),
    "causal-lm": ("GPT2LMHeadModel", GPT2, "CAUSAL_LM", _PREFIX_GPT2, 774_030_080, 1_843_200, 775_873_280),
    "seq2seq-lm": ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM", _LORA_T5, 222_903_552, 884_736, 223_788_288),
    "question-answering": ("BertForQuestionAnswering", BERT, "QUESTION_ANS", _LORA_BERT, 107_721_218, 591_362, 108_312_580),
    "feature-extraction": ("BertModel", BERT, "FEATURE_EXTRACTION", _LORA_BERT, 108_310_272, 589_824, 108_900_096),
    "extra-sequence-lora": ("BertForSequenceClassification", BERT, "SEQ_CLS", _LORA_BERT, 108_311_810, 591_362, 108_903_172),
    "extra-token-lora": ("BertForTokenClassification", BERT, "TOKEN_CLS", _LORA_BERT, 107_721_218, 591_362, 108_312_580),
}
PRINTED = {
    "sequence-classification": "trainable params: 370,178 || all params: 108,681,988 || trainable%: 0.3406",
    "token-classification": "trainable params: 370,178 || all params: 108,091,396 || trainable%: 0.3425",
    "token-classification-page": "trainable params: 370,178 || all params: 108,681,988 || trainable%: 0.3406",
    "causal-lm": "trainable params: 1,843,200 || all params: 775,873,280 || trainable%: 0.2376",
    "seq2seq-lm": "trainable params: 884,736 || all params: 223,788,288 || trainable%: 0.3953",
    "question-answering": "trainable params: 591,362 || all params: 108,312,580 || trainable%: 0.5460",
    "feature-extraction": "trainable params: 589,824 || all params: 108,900,096 || trainable%: 0.5416",
    "extra-sequence-lora": "trainable params: 591,362 || all params: 108,903,172 || trainable%: 0.5430",
    "extra-token-lora": "trainable params: 591,362 || all params: 108,312,580 || trainable%: 0.5460",
}
CLASSES = {
    "BertForSequenceClassification": "BertConfig",
    "BertForTokenClassification": "BertConfig",
    "BertForQuestionAnswering": "BertConfig",
    "BertModel": "BertConfig",
    "GPT2LMHeadModel": "GPT2Config",
    "T5ForConditionalGeneration": "T5Config",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    architecture, options, task, adapter, size, trainable, total = EXAMPLES[name]
    model = on_meta(architecture, CLASSES[architecture], options)
    assert sum(p.numel() for p in model.parameters()) == size
    legacy = LEGACY & adapter.keys()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = ours.get_peft_config({**adapter, "task_type": task})
    assert len(caught) == len(legacy)  # the page's old keys: one warning, no error
    assert all(key in str(warning.message) for key in legacy for warning in caught)
    adapted = ours.get_peft_model(model, config)
    assert adapted.get_nb_trainable_parameters() == (trainable, total)
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out == PRINTED[name] + "\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example_of_the_peer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the table are the peer's of today."""
    architecture, options, task, adapter, _, trainable, total = EXAMPLES[name]
    with using(peer):
        config = peer.get_peft_config({key: value for key, value in adapter.items() if key not in LEGACY} | {"task_type": task})
        adapted = peer.get_peft_model(on_meta(architecture, CLASSES[architecture], options), config)
        assert adapted.get_nb_trainable_parameters() == (trainable, total)
        adapted.print_trainable_parameters()
    assert capsys.readouterr().out == PRINTED[name] + "\n"


@pytest.mark.parametrize("task_class", ["constructor"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example_by_class(name: str, task_class: str) -> None:
    """The page's examples name the class instead of calling get_peft_model."""
    architecture, options, task, adapter, _, trainable, total = EXAMPLES[name]
    config = ours.get_peft_config({key: value for key, value in adapter.items() if key not in LEGACY} | {"task_type": task})
    chosen = ours.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    adapted = chosen(on_meta(architecture, CLASSES[architecture], options), config)
    assert type(adapted).__name__ == peer.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    assert adapted.get_nb_trainable_parameters() == (trainable, total)


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
