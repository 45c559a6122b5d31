"""Every method on every family of models: forward, loss and generate; a cell that can't exist says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import CapabilityError, ConfigError, MissingMethodError, PeftModel, PeftWarning, get_peft_config
from prompt.families import FAMILIES, METHODS, Family, Method, N, fits, made, reference

CELLS = [pytest.param(method, family, id=f"{method}-{family}") for method in METHODS for family in FAMILIES]


def refused(method: str, family: str) -> bool:
    """Return whether the cell can't exist, after checking that its config says so."""
    if fits(METHODS[method], FAMILIES[family]):
        return False
    with pytest.raises(ConfigError, match="CAUSAL_LM"):
        get_peft_config({"task_type": FAMILIES[family].task, **METHODS[method].config})
    return True


def arguments(method: Method, rows: int) -> dict[str, Any]:
    return {name: value[:rows] for name, value in method.arguments.items()}


def per_token(output: Any) -> list[Tensor]:
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [output[name] for name in names if isinstance(output.get(name), Tensor)]


@pytest.mark.parametrize(("method", "family"), CELLS)
@torch.no_grad()
def test_forward(method: str, family: str) -> None:
    """The output is that of the bare base for the virtual tokens and the text put together by hand."""
    if refused(method, family):
        return
    how, kind = METHODS[method], FAMILIES[family]
    model, inputs = made(method, family), kind.inputs()
    expected = per_token(reference(model, how, kind, inputs))
    found = per_token(model(**inputs, **arguments(how, 2)))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        if kind.task in ("TOKEN_CLS", "QUESTION_ANS") and not how.keys_values:
            theirs = theirs[:, N:]  # the caller's tokens
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_loss(method: str, family: str) -> None:
    """The loss is that of the caller's labels at the caller's tokens, and it trains the adapter alone (and the head of the task)."""
    if refused(method, family):
        return
    if FAMILIES[family].task == "FEATURE_EXTRACTION":  # features have no loss
        output = made(method, family)(**FAMILIES[family].inputs(), **arguments(METHODS[method], 2))
        assert "loss" not in output
        return
    how, kind = METHODS[method], FAMILIES[family]
    model, inputs, labels = made(method, family), kind.inputs(), kind.labels()
    output = model(**inputs, **labels, **arguments(how, 2))
    expected = answers(reference(model, how, kind, inputs), how, labels) if kind.task == "QUESTION_ANS" else by_hand(output, how, kind, labels)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert moved <= trained
    assert any("prompt_encoder" in name for name in moved)


def answers(whole: Any, method: Method, labels: dict[str, Tensor]) -> Tensor:
    """Return the loss of answers among all tokens, virtual ones included: the caller's positions stand behind these."""
    lead = 0 if method.keys_values else N
    start, end = (F.cross_entropy(whole[f"{which}_logits"], labels[f"{which}_positions"] + lead) for which in ("start", "end"))
    return (start + end) / 2


def by_hand(output: Any, method: Method, family: Family, labels: dict[str, Tensor]) -> Tensor:
    logits, target = output.logits.float(), labels["labels"]
    if family.causal and method.causal:  # the context's own labels count, too: here the token of type 4
        context = torch.tensor(method.config["cpt_token_ids"]).masked_fill(torch.tensor(method.config["cpt_tokens_type_mask"]) != 4, -100)
        target = torch.cat([context.expand(target.shape[0], -1), target], dim=1)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    if family.causal:
        lead = logits.shape[1] - target.shape[1]
        target = torch.cat([target.new_full((target.shape[0], lead), -100), target], dim=1)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    if family.two:
        logits = logits[:, logits.shape[1] - target.shape[1] :]
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


@torch.no_grad()
def greedy(model: PeftModel, family: Family, method: Method, rows: int, new: int) -> Tensor:
    """Return what choosing the likeliest token of whole forwards gives."""
    inputs = family.inputs(rows)
    where, extra = ("decoder_input_ids" if family.two else "input_ids"), arguments(method, rows)
    if family.two:
        base: Any = model.get_base_model()
        start = base.generation_config.decoder_start_token_id or base.config.decoder_start_token_id or 0
        inputs["decoder_input_ids"] = torch.full((rows, 1), start)
    for _ in range(new):
        last = model(**inputs, **extra).logits[:, -1].argmax(-1, keepdim=True)
        inputs[where] = torch.cat([inputs[where], last], dim=1)
        if not family.two:
            inputs["attention_mask"] = torch.ones_like(inputs[where])
    return inputs[where]


@pytest.mark.parametrize(("method", "family"), CELLS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(method: str, family: str, use_cache: bool) -> None:
    """Greedy generation is a loop over whole forwards; models that can't generate say so."""
    if refused(method, family):
        return
    how, kind = METHODS[method], FAMILIES[family]
    model = made(method, family)
    inputs: dict[str, Any] = {name: value for name, value in kind.inputs().items() if name != "decoder_input_ids"}
    if not (kind.causal or kind.two):
        with pytest.raises(MissingMethodError, match="can't generate"):
            model.generate(**inputs)
        return
    found = model.generate(**inputs, **arguments(how, 2), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None)
    assert torch.equal(found, greedy(model, kind, how, 2, 6))


@pytest.mark.parametrize(("method", "family"), CELLS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(method: str, family: str, side: str) -> None:
    """A row with padding on either side has the outputs that it has alone: pads never stand between virtual tokens and text."""
    if refused(method, family):
        return
    how, kind = METHODS[method], FAMILIES[family]
    if side == "left" and how.keys_values and family in ("bert-seq-cls", "roberta-seq-cls"):
        return  # BERT classifies by what stands first: by a pad, with or without a prefix
    if side == "left" and how.keys_values and family == "bart":
        return  # BART's encoder, which no prefix touches, numbers pads like any other token
    model, inputs = made(method, family), kind.inputs()
    short = {name: value[1:, :4] if name != "decoder_input_ids" else value[1:] for name, value in inputs.items()}
    padded = {name: value.clone() for name, value in inputs.items()}
    text = slice(2, None) if side == "left" else slice(None, 4)
    padded["input_ids"][1], padded["attention_mask"][1] = 0, 0
    padded["input_ids"][1, text], padded["attention_mask"][1, text] = short["input_ids"][0], 1
    alone = per_token(model(**short, **{name: value[1:2] for name, value in how.arguments.items()}))
    together = per_token(model(**padded, **arguments(how, 2)))
    with torch.enable_grad():  # as in training, where nothing is kept from call to call
        recorded = per_token(model(**padded, **arguments(how, 2)))
    for ours, theirs in zip([*together, *recorded], [*alone, *alone], strict=True):
        if kind.two or ours.ndim < 2 or (kind.task == "SEQ_CLS"):
            row, expected = ours[1], theirs[0]
        else:  # per token of the encoder's or decoder's text
            lead = ours.shape[1] - 6
            row = torch.cat([ours[1, :lead], ours[1, lead:][text]])
            expected = theirs[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_loss_of_mixed_rows_is_that_of_each_alone(family: str, side: str) -> None:
    """The last virtual token of a row predicts its first token, whatever other rows have before theirs, and wherever its padding is."""
    model = made("prompt", family)
    more, tokens = (1, 4) if family == "gemma3" else (3, 6)  # all within its window
    model.add_adapter("long", get_peft_config({"task_type": "CAUSAL_LM", "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2 * more}))
    model.add_adapter("prefix", get_peft_config({"task_type": "CAUSAL_LM", "peft_type": "PREFIX_TUNING", "num_virtual_tokens": more}))
    rows: list[Any] = ["default", "__base__", "long", ["long", "default"], "prefix", ["prefix", "default"]]
    inputs = FAMILIES[family].inputs(len(rows), tokens)
    losses, counts = [], []
    for number, names in enumerate(rows):
        text = slice(number % 3, None) if side == "left" else slice(None, tokens - number % 3)
        ids = inputs["input_ids"][number : number + 1, text].clone()
        chosen = [] if names == "__base__" else [names] if isinstance(names, str) else names
        with model.use_adapters(*chosen):
            losses.append(model(input_ids=ids, labels=ids).loss)
        counts.append(ids.shape[1] - (0 if {"default", "long"} & set(chosen) else 1))
        hidden = torch.ones(tokens, dtype=torch.bool)
        hidden[text] = False
        inputs["input_ids"][number, hidden] = 0
        inputs["attention_mask"][number, hidden] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    together = model(**inputs, labels=labels, adapter_names=rows).loss
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning-mlp", "multitask", "prefix"])
@torch.no_grad()
def test_rows_of_encoder_decoder_models(method: str, family: str) -> None:
    model, kind = made(method, family), FAMILIES[family]
    model.add_adapter("lora", get_peft_config({"task_type": kind.task, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    inputs, extra = kind.inputs(3), {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    inputs["attention_mask"][1, 4:] = 0
    rows = ["lora", "default", "__base__"]
    if family == "bart" and (METHODS[method].keys_values or METHODS[method].decoder):
        with pytest.raises(CapabilityError, match="numbers the tokens of all rows alike"):
            model(**inputs, **extra, adapter_names=rows)
        return
    together = model(**inputs, **extra, adapter_names=rows).logits
    for number, name in enumerate(rows):
        with model.use_adapters(*([] if name == "__base__" else [name])):
            alone = model(**{k: v[number : number + 1] for k, v in {**inputs, **extra}.items()}).logits[0]
        torch.testing.assert_close(together[number, -5:], alone[-5:], atol=1e-5, rtol=1e-4)


def test_a_window_that_rows_share_is_said() -> None:
    model = made("prompt", "gemma3")
    model.add_adapter("long", get_peft_config({"task_type": "CAUSAL_LM", "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 7}))
    with pytest.warns(PeftWarning, match="look back 12 tokens"), torch.no_grad():
        model(**FAMILIES["gemma3"].inputs(), adapter_names=["default", "long"])
