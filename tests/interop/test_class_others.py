"""The classes on further bases: decoders of another kind, and encoder-decoders that classify, answer or give features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from interop.cases import Case, assert_close, base, difference, ours, outputs, peer, save, shake, using
from interop.class_cases import (
    EMBEDDINGS,
    LAYERS,
    OTHER_BASES,
    PREFIXES,
    TUNERS,
    N,
    cell,
    inputs_of,
    refusal,
    refused_call,
    rows_without_head,
    task_of,
    train,
)
from interop.test_classes import goes_over_and_back, goes_round

TASK_OF = {name: task for task, names in OTHER_BASES.items() for name in names}
#: the peer adapts `shared` alone, which no layer of these bases reads
LOST_ROWS = ("t5-cls", "t5-token", "bart-cls", "bart-qa")
#: bases whose own forward takes no embeddings, or none without tokens for the decoder; what they say
NO_EMBEDDINGS = {
    "t5-cls": (NotImplementedError, "Passing input embeddings is currently not supported"),
    "bart-cls": (NotImplementedError, "Passing input embeddings is currently not supported"),
    "t5-qa": (ValueError, "If no `decoder_input_ids` or `decoder_inputs_embeds` are passed"),
    "bart-qa": (ValueError, "If no `decoder_input_ids` or `decoder_inputs_embeds` are passed"),
    "bart-features": (ValueError, "If no `decoder_input_ids` or `decoder_inputs_embeds` are passed"),
}
#: what the peer says of prefixes
PREFIX_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "t5-cls": (ValueError, "You must specify exactly one of input_ids or inputs_embeds"),
    "bart-cls": (AttributeError, "cls_layer_name"),
    "bart-qa": (AttributeError, "hidden_states"),
}


def compared(name: str, tuner: str) -> bool:
    task = TASK_OF[name]
    if refusal(task, name, tuner) or refused_call(task, tuner) or rows_without_head(task, tuner):
        return False
    if tuner in LAYERS:
        return not (tuner == "lora-tokens" and name in LOST_ROWS)
    return name.startswith("gpt2") or (tuner in EMBEDDINGS and name not in NO_EMBEDDINGS)


CELLS = [cell(task, name, tuner) for name, task in TASK_OF.items() for tuner in TUNERS if compared(name, tuner)]
both_ways = pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours-to-peer", "peer-to-ours"])


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.id)
@both_ways
def test_a_trained_adapter_goes_over_and_back(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    goes_over_and_back(case, writer, reader, True, tmp_path)


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.id)
def test_both_learn_alike(case: Case) -> None:
    losses = [train(library, case.make(library), case, steps=3) for library in (ours, peer)]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert losses[0][0] != losses[0][2]


@pytest.mark.parametrize(("name", "tuner"), [(name, tuner) for name in TASK_OF for tuner in LAYERS if refusal(TASK_OF[name], name, tuner)])
def test_layers_that_the_peer_refuses(name: str, tuner: str, tmp_path: Path) -> None:
    """LoHa around transposed layers, and rows in classes with a head whose list it adds to."""
    error = refusal(TASK_OF[name], name, tuner)
    assert error
    case = cell(TASK_OF[name], name, tuner)
    with using(peer), pytest.raises(error[0], match=error[1]):
        case.make(peer)
    goes_round(case, tmp_path)


# ---- trained rows of shared embeddings -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LOST_ROWS)
def test_the_peer_trains_rows_that_nothing_reads(name: str, tmp_path: Path) -> None:
    """Its file has them, and ours reads them and uses them: what the peer shows is the same adapter without its rows."""
    case = cell(TASK_OF[name], name, "lora-tokens")
    other = case.make(peer)
    with using(peer):
        other(**inputs_of(case, labels=True)).loss.backward()
    assert [parameter.grad is None for key, parameter in other.named_parameters() if "trainable_tokens_delta" in key] == [True]
    shake(other)
    theirs = outputs(peer, other, inputs_of(case))
    model = case.load(ours, save(peer, other, tmp_path), is_trainable=True)
    assert difference(outputs(ours, model, inputs_of(case)), theirs) > 1e-3
    model(**inputs_of(case, labels=True)).loss.backward()
    [rows] = [parameter for key, parameter in model.named_parameters() if "trainable_tokens_delta" in key]
    assert rows.grad is not None
    assert float(rows.grad.abs().max()) > 0
    with torch.no_grad():  # as if they had not been trained
        rows.copy_(base(name).get_input_embeddings().weight[case.options["trainable_token_indices"]])
    assert_close(outputs(ours, model, inputs_of(case)), theirs, 2e-6)


@pytest.mark.parametrize("name", ["t5-cls", "bart-cls"])
def test_the_peer_has_nothing_to_train_where_rows_are_alone(name: str, tmp_path: Path) -> None:
    case = cell(TASK_OF[name], name, "tokens")
    with using(peer), pytest.raises(RuntimeError, match="does not require grad"):
        case.make(peer)(**inputs_of(case, labels=True)).loss.backward()
    goes_round(case, tmp_path)


# ---- virtual tokens ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NO_EMBEDDINGS)
@pytest.mark.parametrize("tuner", ["prompt", "p-tuning"])
def test_bases_that_take_no_embeddings(name: str, tuner: str, tmp_path: Path) -> None:
    """It is the base that refuses, under either library; the files go over all the same."""
    case = cell(TASK_OF[name], name, tuner)
    error, words = NO_EMBEDDINGS[name]
    for writer, reader, folder in ((ours, peer, tmp_path / "ours"), (peer, ours, tmp_path / "peer")):
        model = case.make(writer)
        shake(model)
        with pytest.raises(error, match=words):
            outputs(writer, model, inputs_of(case))
        save(writer, model, folder)
        loaded = case.load(reader, folder)
        with using(peer):
            tables = [library.get_peft_model_state_dict(found)["prompt_embeddings"] for library, found in ((writer, model), (reader, loaded))]
        torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5-features"])
def test_tasks_of_features(name: str, tmp_path: Path) -> None:
    case = cell(TASK_OF[name], name, "multitask")
    error = refused_call(TASK_OF[name], "multitask")
    assert error
    with using(peer), pytest.raises(error[0], match=error[1]):
        case.make(peer)(**inputs_of(case))
    goes_round(case, tmp_path, labels=False)


@pytest.mark.parametrize("name", [*PREFIX_ERRORS, "t5-qa"])
@pytest.mark.parametrize("tuner", PREFIXES)
def test_prefixes_where_the_peer_fails(name: str, tuner: str, tmp_path: Path) -> None:
    """The peer runs the model's first part alone, which is not the one that has the head; ours runs the model."""
    case = cell(TASK_OF[name], name, tuner)
    if name in PREFIX_ERRORS:
        error, words = PREFIX_ERRORS[name]
        with pytest.raises(error, match=words):
            outputs(peer, case.make(peer), inputs_of(case))
    else:  # answers are read off the encoder, and the prefix has no gradient
        other = case.make(peer)
        with using(peer):
            other(**inputs_of(case, labels=True)).loss.backward()
        assert all(parameter.grad is None for key, parameter in other.named_parameters() if key.startswith("prompt_encoder."))
    goes_round(case, tmp_path)
    model = case.load(ours, tmp_path)
    assert difference(outputs(ours, model, inputs_of(case)), outputs(ours, base(name), inputs_of(case))) > 1e-3
    back = case.load(peer, tmp_path)
    with using(peer):
        table = peer.get_peft_model_state_dict(back)["prompt_embeddings"]
    torch.testing.assert_close(table, ours.get_peft_model_state_dict(model)["prompt_embeddings"], rtol=0, atol=1e-6)


def test_the_peer_lets_the_cross_attention_write_behind_a_prefix() -> None:
    """Without a language model's head it hands BART one cache for both attentions, so that the encoder's keys land among the decoder's.

    By hand: the table (n, 2·layers·width), seen as (2·layers, n, heads, width of a head), in a cache of two parts, or in one.
    """
    case = cell("FEATURE_EXTRACTION", "bart-features", "prefix")
    inputs = {**inputs_of(case), "decoder_input_ids": inputs_of(case, seed=1)["input_ids"]}
    plain = base(case.base)
    rows, length = inputs["decoder_input_ids"].shape
    expected = {}
    for kind in ("two parts", "one"):
        table = case.make(ours).prompt_encoder["default"].embedding.weight.detach()
        keys_values = table.view(N, 4, 4, 4).permute(1, 2, 0, 3).unsqueeze(1).expand(4, rows, 4, N, 4)
        cache = DynamicCache()
        for layer in range(2):
            cache.update(keys_values[2 * layer].clone(), keys_values[2 * layer + 1].clone(), layer)
        given = EncoderDecoderCache(cache, DynamicCache()) if kind == "two parts" else cache
        with torch.no_grad():
            expected[kind] = plain(**inputs, past_key_values=given, use_cache=True).last_hidden_state
    for library, kind in ((ours, "two parts"), (peer, "one")):
        found = outputs(library, case.make(library), inputs)["last_hidden_state"]
        torch.testing.assert_close(found, expected[kind], rtol=0, atol=2e-6)
    assert float((expected["one"] - expected["two parts"]).abs().max()) > 1e-2
    assert length == expected["one"].shape[1]


@pytest.mark.parametrize("name", ["t5-token", "t5-features"])
@pytest.mark.parametrize("tuner", PREFIXES)
def test_prefixes_that_no_layer_reads(name: str, tuner: str) -> None:
    """An encoder of T5 takes a cache and does not look at it: the peer refuses one of the classes, and is silent about the other."""
    case = cell(TASK_OF[name], name, tuner)
    if name == "t5-token":
        with pytest.raises(ValueError, match="does not support past key values"):
            outputs(peer, case.make(peer), inputs_of(case))
    else:
        plain = outputs(peer, base(name), inputs_of(case))
        assert difference(outputs(peer, cell(TASK_OF[name], name, "prefix").make(peer), inputs_of(case)), plain) == 0
    with pytest.raises(ours.CapabilityError, match="past key values"):
        outputs(ours, case.make(ours), inputs_of(case))


def test_the_table_is_whole() -> None:
    """What is not compared is in a test of its own above."""
    left = {(name, tuner) for name in TASK_OF for tuner in TUNERS if tuner != "cpt" and not compared(name, tuner)}
    assert {name for name, tuner in left if tuner == "lora-tokens"} == set(LOST_ROWS)
    assert {name for name, tuner in left if tuner == "tokens"} == {*TASK_OF} - {"t5-features", "bart-features"}
    assert {name for name, tuner in left if tuner.startswith("loha")} == {"gpt2-cls", "gpt2-token", "gpt2-qa"}
    assert {name for name, tuner in left if tuner == "prompt"} == set(NO_EMBEDDINGS)
    assert {name for name, tuner in left if tuner == "prefix"} == {*PREFIX_ERRORS, "t5-qa", "t5-token", "t5-features", "bart-features"}
    assert not [tuner for _, tuner in left if tuner in ("lora", "dora", "lora-saved")]
    assert {task_of(case) for case in CELLS} == set(OTHER_BASES)
